"""Policy files."""

import hashlib

import pytest

from spectr.errors import DataError
from spectr.serving.catalog import AccessPolicy, read_policy

GOOD = """
keys:
  - name: team-a
    key: sk-team-a-secret
    experts: [sst2, agnews]
  - name: team-b
    key_sha256: {digest}
    experts: "*"
    base: true
except: [hostile]
"""
EXPERTS = ("agnews", "hostile", "sst2", "squad")


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(GOOD.format(digest=hashlib.sha256(b"sk-team-b-secret").hexdigest().upper()))
    return read_policy(path)


def test_each_key_has_its_set_and_what_is_excepted_is_nobodys(policy):
    a, b = policy.holder("sk-team-a-secret"), policy.holder("sk-team-b-secret")
    assert policy.granted(a, EXPERTS) == ("agnews", "sst2")
    assert policy.granted(b, EXPERTS) == ("agnews", "squad", "sst2")
    assert (a.base, b.base, a.admin) == (False, True, False)


@pytest.mark.parametrize("secret", [None, "", "sk-team-a-secret ", "sk-team-c-secret", "\udcff"])
def test_other_keys_are_nobodys(policy, secret):
    assert policy.holder(secret) is None


def test_json_is_read_too(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text('{"keys": [{"name": "a", "key": "sk-12345"}]}')
    assert read_policy(path).keys[0].experts == ()


ENTRIES = "a list with at least one entry, each with a name, its key (or key_sha256) and its experts"
ONE, LONG = "either key or key_sha256", "a quoted text of at least 8 characters"
MEANT = "did you mean 'except'? known: except, keys"
SHA, BOTH = "printf %s KEY | sha256sum", "keys: [{name: a, key: sk-secret-1, key_sha256: " + "a" * 64 + "}]"
NAMES = 'a list of names, such as [sst2, agnews], or "*" for all'
FIELDS = "known: admin, base, experts, key, key_sha256, name"


@pytest.mark.parametrize(
    ("text", "found", "expected"),
    [
        ("", "the file is empty", "fields: keys, except"),
        (
            "keys: []",
            "keys is empty",
            "a list with at least one entry, each with a name, its key (or key_sha256) and its experts",
        ),
        (
            "keys: [sk-secret-1]",
            "keys[0] is a text of 11 characters",
            "fields: name, key, key_sha256, experts, base, admin",
        ),
        ("keys: {sk-secret-1: [x]}", "keys is a mapping", "a list with at least one entry"),
        ("keys: [{key: sk-secret-1}]", "keys[0].name is missing", "a name for the key's owner, such as team-a"),
        ("keys: [{name: a}]", "keys[0] has no key", ONE),
        (
            "keys: [{name: a, key: sk-secret-1, key_sha256: " + "a" * 64 + "}]",
            "keys[0] has both",
            "either key or key_sha256",
        ),
        ("keys: [{name: a, key: short}]", "keys[0].key is a text of 5 characters", LONG),
        ("keys: [{name: a, key: 12345678}]", "keys[0].key is a number", LONG),
        (
            "keys: [{name: a, key_sha256: abc}]",
            "keys[0].key_sha256 is a text of 3 characters",
            "printf %s KEY | sha256sum",
        ),
        (
            "keys: [{name: a, key: sk-secret-1, expert: x}]",
            "keys[0].expert is not a field",
            f"did you mean 'experts'? {FIELDS}",
        ),
        ("keys: [{name: a, sk-secret-1: x}]", "keys[0].(a name that is not shown) is not a field", FIELDS),
        ("keys: [{name: a, key: sk-secret-1, experts: all}]", 'keys[0].experts is "all"', NAMES),
        ("keys: [{name: a, key: sk-secret-1, experts: [x, 1]}]", "keys[0].experts[1] is 1", NAMES),
        ("keys: [{name: a, key: sk-secret-1, admin: maybe}]", 'keys[0].admin is "maybe"', "true or false"),
        ('keys: [{name: a, key: sk-secret-1, admin: "yes"}]', 'keys[0].admin is "yes"', "true or false"),
        (
            "excpet: [x]\nkeys: [{name: a, key: sk-secret-1}]",
            "excpet is not a field",
            "did you mean 'except'? known: except, keys",
        ),
        ("except: x\nkeys: [{name: a, key: sk-secret-1}]", 'except is "x"', "a list of names, such as [sst2, agnews]"),
        (
            "keys: [{name: a, key: sk-secret-1}, {name: b, key: sk-secret-3}, {name: a, key: sk-secret-2}]",
            "the file has the same name in keys[0] and keys[2]",
            "a different name for each",
        ),
        (
            "keys: [{name: a, key: sk-secret-1}, {name: b, key: sk-secret-1}]",
            "the file has the same key in keys[0] and keys[1]",
            "a different key for each",
        ),
    ],
)
def test_what_is_no_policy_is_reported_without_showing_a_key(tmp_path, text, found, expected):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_policy(path)
    first, fault, told, do = str(caught.value).splitlines()  # one fault alone
    assert first == f"{path} is not a policy"
    assert fault.startswith(f"- {found}")
    assert told.startswith("  expected: ")
    assert expected in told
    assert "howto/serving" in do
    assert "sk-secret" not in str(caught.value)


def test_all_that_is_wrong_is_reported_in_the_files_order(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text('{"keys": [{"experts": "all"}, {"name": "b", "key": "sk-secret-1", "base": "x"}], "more": 1}')
    with pytest.raises(DataError) as caught:
        read_policy(path)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("- ")]
    assert lines == [
        "- keys[0].name is missing",
        '- keys[0].experts is "all"',
        '- keys[1].base is "x"',
        "- more is not a field",
    ]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("policy.yaml", b"keys: [", "policy.yaml, line 1: expected the node content"),
        ("policy.yaml", b"keys:\n\t- a", "policy.yaml, line 2: found character"),
        ("policy.json", b"{\n'keys'", "policy.json, line 2: Expecting property name"),
        ("policy.yaml", b"\xff\xfe", "policy.yaml is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_is_reported_with_its_line(tmp_path, name, text, told):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(DataError, match=told):
        read_policy(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_policy(tmp_path / "none.yaml")


def test_experts_that_are_not_there_are_all_reported(policy):
    policy.check(EXPERTS)
    with pytest.raises(DataError, match="2 problems") as caught:
        policy.check(("sst2", "agnew"))
    assert "'agnews' of team-a" in str(caught.value)
    assert "did you mean 'agnew'" in str(caught.value)
    assert "'hostile' of except" in str(caught.value)


def test_a_key_is_not_shown_by_its_repr():
    policy = AccessPolicy.model_validate({"keys": [{"name": "a", "key": "sk-secret-1"}]})
    assert "sk-secret" not in repr(policy)

"""Policy files."""

import hashlib

import pytest

from spectr.errors import DataError
from spectr.serving.policy import Policy, read_policy

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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is no policy"),
        ("keys: []", "keys"),
        ("keys: [{name: a}]", "either key or key_sha256"),
        ("keys: [{name: a, key: sk-secret-1, key_sha256: " + "a" * 64 + "}]", "either key or key_sha256"),
        ("keys: [{name: a, key: short}]", "keys.0.key"),
        ("keys: [{name: a, key_sha256: abc}]", "key_sha256"),
        ("keys: [{name: a, key: sk-secret-1, expert: [x]}]", "expert"),
        ("keys: [{name: a, key: sk-secret-1, experts: all}]", "experts"),
        ("keys: [{name: a, key: sk-secret-1}, {name: a, key: sk-secret-2}]", "same name"),
        ("keys: [{name: a, key: sk-secret-1}, {name: b, key: sk-secret-1}]", "same key"),
        ("keys: [", "line"),
    ],
)
def test_what_is_no_policy_is_told_without_showing_a_key(tmp_path, text, told):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=told) as caught:
        read_policy(path)
    assert str(path) in str(caught.value)
    assert "sk-secret" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_policy(tmp_path / "none.yaml")


def test_experts_that_are_not_there_are_all_told(policy):
    policy.check(EXPERTS)
    with pytest.raises(DataError, match="2 problems") as caught:
        policy.check(("sst2", "agnew"))
    assert "'agnews' of team-a" in str(caught.value)
    assert "did you mean 'agnew'" in str(caught.value)
    assert "'hostile' of except" in str(caught.value)


def test_a_key_is_not_shown_by_its_repr():
    policy = Policy.model_validate({"keys": [{"name": "a", "key": "sk-secret-1"}]})
    assert "sk-secret" not in repr(policy)

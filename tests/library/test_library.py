"""A library on disk does what was asked or leaves everything as it was, and says why."""

import pytest
import torch

from adapters_on_disk import assert_says, load_with_peft, save_with_peft, tiny_llama, tree, write_adapter
from library_on_disk import CONFIG, WEIGHTS, assert_sound
from spectr.errors import AdapterError, LibraryError
from spectr.hashing import file_sha256
from spectr.library import ExpertLibrary, LibraryStore

pytestmark = pytest.mark.usefixtures("no_sync")


class TestRoundTrip:
    def test_added_experts_are_listed_in_alphabetical_order(self, tmp_path, adapter, other_adapter):
        store = LibraryStore(tmp_path / "new" / "library")
        for name, source in [("sql", adapter), ("law", other_adapter), ("Zulu", adapter), ("9th", other_adapter)]:
            store.add(name, source)
        assert_sound(store, "9th", "Zulu", "law", "sql")
        assert [entry.name for entry in store.entries] == ["9th", "Zulu", "law", "sql"]
        library = ExpertLibrary.open(store.root)
        assert list(library) == ["9th", "Zulu", "law", "sql"]
        assert (len(library), "law" in library, "slq" in library) == (4, True, False)

    def test_the_stored_files_are_the_originals(self, library, adapter):
        (entry,) = [entry for entry in library.entries if entry.name == "sql"]
        assert tree(library.root / entry.folder) == tree(adapter)
        assert entry.sha256 == {file: file_sha256(adapter / file) for file in (CONFIG, WEIGHTS)}

    def test_cards_are_kept_and_other_files_are_not(self, tmp_path, adapter):
        for file in ("README.md", "expert.json", "optimizer.pt", "tokenizer.json"):
            (adapter / file).write_text(f"this is {file}")
        (adapter / "runs").mkdir()
        store = LibraryStore(tmp_path / "library")
        stored = tree(store.root / store.add("sql", adapter).folder)
        assert stored == {f: tree(adapter)[f] for f in (CONFIG, WEIGHTS, "README.md", "expert.json")}

    def test_the_original_is_left_alone(self, tmp_path, adapter):
        before = tree(adapter)
        store = LibraryStore(tmp_path / "library")
        store.add("sql", adapter)
        store.remove("sql")
        assert tree(adapter) == before

    def test_peft_loads_a_stored_expert_as_it_loads_the_original(self, tmp_path):
        from peft import LoraConfig

        config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3})
        original = save_with_peft(tmp_path / "a", tiny_llama(), config)
        store = LibraryStore(tmp_path / "library")
        entry = store.add("sql", original)
        ids = torch.arange(6)[None]
        with torch.no_grad():
            bare = tiny_llama()(ids).logits
            stored, expected = (
                load_with_peft(folder, tiny_llama())(ids).logits for folder in (store.root / entry.folder, original)
            )
        assert torch.equal(stored, expected)
        assert (stored - bare).abs().max() > 0.01
        assert (entry.ranks, entry.modules, entry.targets) == ((2, 3), 4, ("down_proj", "q_proj"))
        assert entry.parameters == 2 * (2 * (8 + 8) + 3 * (12 + 8))

    def test_an_expert_from_the_library_has_the_originals_factors(self, library, adapter):
        from safetensors.torch import load_file

        original, expert = load_file(adapter / WEIGHTS), ExpertLibrary.open(library.root)["sql"]
        with expert.open() as read:
            for module, shape in expert.shapes.items():
                A, B, scale = read(module)
                assert torch.equal(A, original[shape.key_A])
                assert torch.equal(B, original[shape.key_B])
                assert scale == 2.0
        assert (expert.name, len(expert.shapes)) == ("sql", 2)

    def test_replacing_changes_that_expert_only(self, library, tmp_path):
        law = library.entry("law")
        new = library.add("sql", write_adapter(tmp_path / "new", seed=7), replace=True)
        assert_sound(library, "law", "sql")
        assert LibraryStore(library.root).entry("law") == law
        assert LibraryStore(library.root).entry("sql") == new
        assert tree(library.root / new.folder) == tree(tmp_path / "new")

    def test_replacing_an_expert_that_is_not_there_adds_it(self, library, adapter):
        library.add("med", adapter, replace=True)
        assert_sound(library, "law", "med", "sql")

    def test_replacing_with_the_same_content_changes_nothing(self, library, adapter):
        before = library.entry("sql")
        assert library.add("sql", adapter, replace=True).folder == before.folder
        assert_sound(library, "law", "sql")

    def test_the_same_content_under_two_names_is_two_experts(self, library, adapter):
        library.add("twin", adapter)
        library.remove("sql")
        assert_sound(library, "law", "twin")

    def test_removing_leaves_the_others(self, library):
        library.remove("sql")
        assert_sound(library, "law")
        library.remove("law")
        assert_sound(library)

    def test_a_removed_expert_can_be_added_again(self, library, adapter):
        before = tree(library.root / library.entry("sql").folder)
        library.remove("sql")
        assert tree(library.root / library.add("sql", adapter).folder) == before
        assert_sound(library, "law", "sql")

    def test_replacing_mends_a_damaged_expert(self, library, adapter):
        weights = library.root / library.entry("sql").folder / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1])
        library.add("sql", adapter, replace=True)
        assert_sound(library, "law", "sql")

    def test_a_store_sees_what_another_one_wrote_before_it_writes(self, library, adapter):
        other = LibraryStore(library.root)
        assert len(other.entries) == 2
        library.add("med", adapter)
        other.add("art", adapter)
        assert_sound(library, "art", "law", "med", "sql")

    @pytest.mark.parametrize("name", ["a", "A-1_b.c", "0", "x" * 100])
    def test_allowed_names(self, tmp_path, adapter, name):
        store = LibraryStore(tmp_path / "library")
        store.add(name, adapter)
        assert_sound(store, name)


class TestRefusals:
    def test_a_name_that_is_taken(self, library, other_adapter, unchanged):
        with pytest.raises(LibraryError) as caught:
            library.add("sql", other_adapter)
        given = (f"{library.root} already has an expert 'sql'",)
        assert_says(caught.value, given=given, expected=None, do="choose another name, or use --replace")
        assert unchanged()

    def test_a_name_that_another_store_took_meanwhile(self, library, adapter, other_adapter):
        other = LibraryStore(library.root)
        assert len(other.entries) == 2
        library.add("med", adapter)
        before = tree(library.root)
        with pytest.raises(LibraryError, match="already has an expert 'med'"):
            other.add("med", other_adapter)
        assert tree(library.root) == before

    def test_the_very_same_files_are_no_fault_and_change_nothing(self, library, adapter):
        entry, before = library.add("med", adapter), tree(library.root)
        assert LibraryStore(library.root).add("med", adapter) == entry
        (adapter / "README.md").write_text("another card")
        assert library.add("med", adapter) == entry
        assert tree(library.root) == before
        (library.root / entry.folder / "adapter_model.safetensors").write_bytes(b"damaged")
        with pytest.raises(LibraryError, match="already has an expert 'med'"):
            library.add("med", adapter)

    @pytest.mark.parametrize(
        "name", ["", ".hidden", "-x", "_x", "a/b", "../a", "a b", "é", "a\0", "x" * 101, "manifest/"]
    )
    def test_a_name_that_is_not_allowed(self, library, adapter, unchanged, name):
        with pytest.raises(LibraryError) as caught:
            library.add(name, adapter)
        assert_says(
            caught.value,
            given=(f"'{name}' is not a valid expert name",),
            expected="up to 100 letters, digits, dots, dashes and underscores; the first is a letter or digit",
            do=None,
        )
        assert unchanged()

    @pytest.mark.parametrize("use", ["remove", "entry", "getitem", "without", "check"])
    def test_an_unknown_name(self, library, unchanged, use):
        opened = ExpertLibrary.open(library.root)
        uses = {
            "remove": library.remove,
            "entry": library.entry,
            "getitem": opened.__getitem__,
            "without": opened.without,
            "check": opened.check,
        }
        with pytest.raises(LibraryError) as caught:
            uses[use]("slq")
        assert_says(caught.value, given=("expert 'slq'",), expected=None, do="did you mean 'sql'? known: law, sql")
        assert unchanged()

    def test_all_unknown_names_are_reported_at_once(self, library):
        with pytest.raises(LibraryError) as caught:
            ExpertLibrary.open(library.root).check("slq", "law", "zzz")
        assert str(caught.value) == (
            "unknown experts: 2 problems\n"
            "- unknown expert 'slq'\n  to do: did you mean 'sql'? known: law, sql\n"
            "- unknown expert 'zzz'\n  to do: known: law, sql"
        )

    def test_an_adapter_that_cannot_be_used(self, library, tmp_path, unchanged):
        with pytest.raises(AdapterError, match="use_qalora is set"):
            library.add("dora", write_adapter(tmp_path / "dora", use_qalora=True))
        with pytest.raises(AdapterError, match="there is no folder"):
            library.add("lost", tmp_path / "nowhere")
        assert unchanged()

    def test_with_expert_of_a_name_that_is_taken(self, library, adapter):
        with pytest.raises(LibraryError) as caught:
            ExpertLibrary.open(library.root).with_expert("sql", adapter)
        given = ("an expert 'sql' already exists",)
        assert_says(caught.value, given=given, expected=None, do="remove it first, or choose another name")

    @pytest.mark.parametrize("below", ["", "further"])
    def test_a_root_that_is_a_file(self, tmp_path, adapter, below):
        (tmp_path / "library").write_text("precious")
        root = tmp_path / "library" / below
        with pytest.raises(LibraryError) as caught:
            LibraryStore(root).add("sql", adapter)
        assert_says(
            caught.value,
            given=(f"{root} cannot be written: ", "the library is unchanged"),
            expected="a writable folder",
            do="check the path and its permissions",
        )
        assert (tmp_path / "library").read_text() == "precious"

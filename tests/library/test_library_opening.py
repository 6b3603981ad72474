"""Opening and verifying a library on disk: plain folders, damage, and libraries of an older format."""

import json
import shutil

import pytest

from adapters_on_disk import assert_says, tree, write_adapter
from library_on_disk import CONFIG, WEIGHTS, assert_sound, folders, read_entry, to_first_format, write_entry
from spectr.errors import LibraryError, SpectrError
from spectr.hashing import file_sha256
from spectr.library import ExpertLibrary, LibraryStore

pytestmark = pytest.mark.usefixtures("no_sync")


class TestOpening:
    def test_a_plain_folder_of_adapters(self, tmp_path):
        for number, name in enumerate(["sql", "law", "med"]):
            write_adapter(tmp_path / name, seed=number)
        (tmp_path / "notes").mkdir()
        (tmp_path / "todo.txt").write_text("x")
        before = tree(tmp_path)
        library = ExpertLibrary.open(tmp_path)
        assert library.names == ("law", "med", "sql")
        assert library["law"].weights == tmp_path / "law" / WEIGHTS
        assert tree(tmp_path) == before

    def test_a_thousand_experts_open_without_their_files(self, tmp_path, library):
        entry = read_entry(library.root, "law")
        shutil.copy(library.root / "manifest.json", tmp_path)
        (tmp_path / "entries").mkdir()
        for i in range(1000):
            text = json.dumps({**entry, "name": f"e{i:04}", "folder": f"e{i:04}-absent"})
            (tmp_path / "entries" / f"e{i:04}.json").write_text(text)
        opened = ExpertLibrary.open(tmp_path)
        assert opened.names == tuple(f"e{i:04}" for i in range(1000))
        assert "e0999" in opened
        with pytest.raises(LibraryError) as caught:
            opened["e0500"]
        assert_says(
            caught.value,
            given=(f"{tmp_path} is damaged", "expert 'e0500'", f"{tmp_path / 'e0500-absent'}"),
            expected="a folder with adapter_config.json",
            do=f"spectr library verify -l {tmp_path}",
        )

    @pytest.mark.parametrize("folder", ["../elsewhere", "/etc", "a/b", "..", ""])
    def test_a_folder_outside_the_library_is_refused(self, library, folder):
        write_entry(library.root, "law", folder=folder)
        with pytest.raises(LibraryError, match="is not a folder of this library"):
            ExpertLibrary.open(library.root)

    def test_one_expert_more_or_less_changes_nothing_on_disk(self, library, adapter, unchanged):
        opened = ExpertLibrary.open(library.root)
        assert opened.with_expert("med", adapter).names == ("law", "med", "sql")
        assert opened.without("law").names == ("sql",)
        assert opened.names == ("law", "sql")
        assert unchanged()

    def test_from_adapters_copies_nothing(self, adapter, other_adapter):
        library = ExpertLibrary.from_adapters({"sql": adapter, "law": str(other_adapter)})
        assert library.names == ("law", "sql")
        assert library["sql"].weights == adapter / WEIGHTS

    def test_a_representation_of_use(self, library):
        assert repr(ExpertLibrary.open(library.root)) == f"ExpertLibrary('{library.root}', 2 experts: law, sql)"

    def test_no_such_folder(self, tmp_path):
        root = tmp_path / "library"
        with pytest.raises(LibraryError) as caught:
            ExpertLibrary.open(root)
        given = (f"there is no library folder {root}",)
        assert_says(caught.value, given=given, expected="a folder of experts", do="spectr library add")

    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / "library").write_text("x")
        with pytest.raises(LibraryError) as caught:
            ExpertLibrary.open(tmp_path / "library")
        given = (f"{tmp_path / 'library'} is a file",)
        assert_says(caught.value, given=given, expected="a folder of experts", do="check --library")

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(LibraryError) as caught:
            ExpertLibrary.open(tmp_path)
        assert_says(
            caught.value,
            given=(f"{tmp_path} holds no experts",),
            expected="a manifest.json, or folders with adapter_config.json",
            do="spectr library add",
        )

    def test_an_adapter_given_in_place_of_a_library(self, adapter):
        with pytest.raises(LibraryError) as caught:
            ExpertLibrary.open(adapter)
        given = (f"{adapter} holds no experts (it is an adapter itself)",)
        assert_says(
            caught.value, given=given, expected="a manifest.json, or folders", do="pass its parent folder, or add"
        )

    def test_broken_adapters_of_a_plain_folder_are_reported_together(self, tmp_path):
        write_adapter(tmp_path / "fine")
        write_adapter(tmp_path / "dora", use_qalora=True)
        (write_adapter(tmp_path / "bare") / WEIGHTS).unlink()
        with pytest.raises(SpectrError, match="2 problems") as caught:
            ExpertLibrary.open(tmp_path)
        assert f"expert 'bare': {tmp_path / 'bare'} has no {WEIGHTS}" in str(caught.value)
        assert "expert 'dora' cannot be routed exactly: use_qalora is set" in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            (b"", "Invalid JSON"),
            (b'{"format": 1, "experts": [', "Invalid JSON"),
            (b"\xff\xfe", "Invalid JSON"),
            (b"[]", "should be an object"),
            (b'{"format": 1, "experts": [{"name": "a"}]}', "experts.0.folder: Field required"),
            (b'{"format": 1, "colour": 1}', "colour: Extra inputs are not permitted"),
            (b'{"format": 3, "experts": []}', "format 3 is not 2: another version of spectr wrote it"),
            (b'{"format": 2, "experts": []}', "in format 2 entries are files in entries"),
        ],
    )
    @pytest.mark.parametrize("use", ["open", "add", "remove", "verify"])
    def test_a_damaged_manifest(self, library, adapter, use, text, shown):
        (library.root / "manifest.json").write_bytes(text)
        before = tree(library.root)
        store = LibraryStore(library.root)
        uses = {
            "open": lambda: ExpertLibrary.open(library.root),
            "add": lambda: store.add("med", adapter),
            "remove": lambda: store.remove("sql"),
            "verify": store.verify,
        }
        with pytest.raises(LibraryError) as caught:
            uses[use]()
        given = (f"{library.root / 'manifest.json'} is not a library manifest", shown)
        assert_says(caught.value, given=given, expected="format 2", do="restore the file")
        assert tree(library.root) == before

    @pytest.mark.parametrize("order", [["b", "a"], ["a", "a"]])
    def test_a_manifest_of_format_1_out_of_order(self, library, order):
        to_first_format(library.root)
        path = library.root / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["experts"] = [{**entry, "name": n} for entry, n in zip(manifest["experts"], order, strict=True)]
        path.write_text(json.dumps(manifest))
        with pytest.raises(LibraryError) as caught:
            ExpertLibrary.open(library.root)
        given = ("names of experts must be different and in alphabetical order",)
        assert_says(caught.value, given=given, expected="format 2", do="restore the file")

    def test_a_damaged_entry(self, library, adapter):
        path = library.root / "entries" / "sql.json"
        path.write_text('{"name": "sql"')
        before, store = tree(library.root), LibraryStore(library.root)
        for use in (lambda: ExpertLibrary.open(library.root), lambda: store.entry("sql")):
            with pytest.raises(LibraryError) as caught:
                use()
            given = (f"{path} is not an expert's entry", "Invalid JSON")
            do = f"spectr library add sql ADAPTER --library {library.root} --replace; or remove it"
            assert_says(caught.value, given=given, expected="format 2", do=do)
        faults = store.verify()
        assert faults["law"] is None
        assert "Invalid JSON" in str(faults["sql"])
        with pytest.raises(LibraryError, match="already has an expert 'sql'"):
            library.add("sql", adapter)
        assert tree(library.root) == before
        library.add("med", adapter)  # which the damage does not concern
        assert store.entry("med").folder in {path.name for path in library.root.iterdir()}

    @pytest.mark.parametrize("use", ["remove", "replace"])
    def test_a_damaged_entry_is_mended(self, library, other_adapter, use):
        (library.root / "entries" / "sql.json").write_text("{}")
        if use == "remove":
            library.remove("sql")
            assert_sound(library, "law")
        else:
            library.add("sql", other_adapter, replace=True)
            assert_sound(library, "law", "sql")
            assert len(folders(library.root)) == 2  # the old one went, though its entry could not say which it was

    def test_a_lost_entry_is_reported_and_can_be_restored(self, library):
        folder = library.root / library.entry("sql").folder
        (library.root / "entries" / "sql.json").unlink()
        fault = LibraryStore(library.root).verify()["sql"]
        given, do = (f"{folder} has no entry",), f"spectr library add sql {folder} --library {library.root}"
        assert_says(fault, given=given, expected=None, do=do)
        library.add("sql", folder)
        assert_sound(library, "law", "sql")

    def test_a_mark_on_a_damaged_entry_hinders_nobody(self, library, adapter):
        folder = library.entry("sql").folder
        (library.root / f".pending-{folder}").touch()
        (library.root / "entries" / "sql.json").write_text("{}")
        library.add("med", adapter)
        assert (library.root / folder).is_dir()
        library.add("sql", adapter, replace=True)
        assert_sound(library, "law", "med", "sql")

    def test_a_folder_of_the_user_is_no_lost_expert(self, library, adapter):
        shutil.copytree(adapter, library.root / "mine-0123456789ab")
        assert library.verify() == {"law": None, "sql": None}

    def test_a_library_is_not_made_inside_an_adapter(self, adapter, other_adapter):
        before = tree(adapter)
        with pytest.raises(LibraryError, match="is an adapter itself"):
            LibraryStore(adapter).add("law", other_adapter)
        assert {path: digest for path, digest in tree(adapter).items() if path != ".lock"} == before

    def test_a_folder_that_holds_a_library(self, library):
        with pytest.raises(LibraryError, match=f"use the library inside it: {library.root}"):
            ExpertLibrary.open(library.root.parent)

    def test_all_damaged_entries_at_once(self, library):
        for name in ("law", "sql"):
            (library.root / "entries" / f"{name}.json").write_text("{}")
        with pytest.raises(LibraryError, match=r"2 problems(.|\n)*law.json(.|\n)*sql.json"):
            ExpertLibrary.open(library.root)

    def test_an_entry_under_another_name(self, library):
        (library.root / "entries" / "law.json").rename(library.root / "entries" / "tax.json")
        with pytest.raises(LibraryError, match=r"tax.json is the entry of 'law'"):
            ExpertLibrary.open(library.root)

    def test_entries_that_are_lost(self, library, adapter):
        shutil.rmtree(library.root / "entries")
        before = tree(library.root)
        for use in (lambda: ExpertLibrary.open(library.root), lambda: library.add("med", adapter)):
            with pytest.raises(LibraryError, match=r"entries cannot be read: No such file"):
                use()
        assert tree(library.root) == before


class TestFirstFormat:
    """Libraries of format 1, whose manifest has all entries."""

    def test_opens_as_it_is(self, library):
        expected = library.entries
        to_first_format(library.root)
        before, store = tree(library.root), LibraryStore(library.root)
        assert store.entries == expected
        assert store.entry("sql") == expected[1]
        assert store.verify() == {"law": None, "sql": None}
        assert ExpertLibrary.open(library.root).names == ("law", "sql")
        assert tree(library.root) == before

    @pytest.mark.parametrize("use", ["add", "replace", "remove"])
    def test_a_change_makes_it_one_of_this_format(self, library, adapter, use):
        expected = {entry.name: entry for entry in library.entries}
        to_first_format(library.root)
        store = LibraryStore(library.root)
        if use == "remove":
            store.remove("sql")
            del expected["sql"]
        else:
            name = {"add": "med", "replace": "law"}[use]
            expected[name] = store.add(name, adapter, replace=True)
        assert json.loads((library.root / "manifest.json").read_text()) == {"format": 2}
        assert {entry.name: entry for entry in LibraryStore(library.root).entries} == expected
        assert_sound(library, *sorted(expected))

    def test_a_refused_change_leaves_it(self, library, other_adapter):
        to_first_format(library.root)
        before = tree(library.root)
        with pytest.raises(LibraryError, match="already has an expert 'sql'"):
            LibraryStore(library.root).add("sql", other_adapter)
        assert tree(library.root) == before


class TestVerify:
    def test_all_is_well(self, library):
        assert library.verify() == {"law": None, "sql": None}

    @pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
    @pytest.mark.parametrize("position", [0, -1])
    def test_a_flipped_bit_is_found(self, library, adapter, file, position):
        path = library.root / library.entry("sql").folder / file
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)
        faults = LibraryStore(library.root).verify()
        assert faults["law"] is None
        assert_says(
            faults["sql"],
            given=(f"{path} changed since it was added (its SHA-256 differs)",),
            expected=file_sha256(adapter / file),
            do=f"add the expert again from {adapter}, with --replace",
        )

    @pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
    def test_a_missing_file_is_found(self, library, file):
        path = library.root / library.entry("law").folder / file
        path.unlink()
        faults = LibraryStore(library.root).verify()
        assert faults["sql"] is None
        assert_says(faults["law"], given=(f"{path} is missing",), expected=None, do="--replace")

    def test_a_missing_folder_is_found(self, library):
        shutil.rmtree(library.root / library.entry("law").folder)
        assert_says(library.verify()["law"], given=("is missing",), expected=None, do="--replace")

    def test_files_that_match_their_hashes_are_read_too(self, library):
        """An expert that its entry vouches for, yet that cannot be routed."""
        folder = library.root / library.entry("sql").folder
        write_adapter(folder, use_qalora=True)
        write_entry(library.root, "sql", sha256={file: file_sha256(folder / file) for file in (CONFIG, WEIGHTS)})
        fault = LibraryStore(library.root).verify()["sql"]
        assert_says(
            fault, given=("expert 'sql'", "use_qalora is set"), expected="a plain LoRA adapter", do="retrain it"
        )

    def test_an_empty_library_has_no_faults(self, tmp_path):
        assert LibraryStore(tmp_path / "nothing").verify() == {}

"""Documents of plain text: those of the package, folders of splits, and folders without."""

from pathlib import Path

import pytest

from qvlm.data.text import EMBEDDED, SPLITS, load_documents
from qvlm.errors import UserError


def test_the_splits_of_the_package_share_no_text() -> None:
    seen: set[str] = set()
    for split in SPLITS:
        documents = load_documents("text", split)
        paragraphs = {p for document in documents for p in document.text.split("\n\n")}
        long = {paragraph for paragraph in paragraphs if len(paragraph) > 40}
        assert len(long) > 20
        assert not long & seen
        seen |= long


def test_the_sources_of_the_package_are_named() -> None:
    readme = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    for split in SPLITS:
        for document in load_documents("text", split):
            stem = document.name.rstrip("0123456789").removesuffix("-")
            kind = "jargon" if stem.startswith("jargon") else stem
            assert f"`{kind}-*`" in readme


def test_files_without_splits_are_dealt_by_their_names(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number}", encoding="utf-8")
    before = {split: load_documents(str(tmp_path), split) for split in SPLITS}
    names = [document.name for documents in before.values() for document in documents]
    assert sorted(names) == sorted(str(number) for number in range(40))
    assert len(before["test"]) > len(before["validation"]) > 0
    (tmp_path / "more.txt").write_text("another", encoding="utf-8")
    for split in SPLITS:
        after = load_documents(str(tmp_path), split)
        assert [document for document in after if document.name != "more"] == before[split]


def test_a_limit_takes_the_first_documents(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    for name in "cab":
        (tmp_path / "test" / f"{name}.txt").write_text(name, encoding="utf-8")
    assert [d.text for d in load_documents(str(tmp_path), "test", 2)] == ["a", "b"]
    with pytest.raises(UserError, match="Give 1 to 3"):
        load_documents(str(tmp_path), "test", 4)


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe\xfa", "cannot be read as UTF-8"), (b" \n", "is empty")]
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "broken.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"broken.txt {message}"):
        load_documents(str(tmp_path), "test")


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no text for split test"):
        load_documents(str(tmp_path), "test")
    with pytest.raises(UserError, match="is not a folder"):
        load_documents(str(tmp_path / "absent"), "test")
    with pytest.raises(UserError, match="Choose one of: train, validation, test"):
        load_documents("text", "dev")

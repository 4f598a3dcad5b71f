"""push and pull against a hub on this machine: what is transferred, refined, resumed, rejected."""

import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import transformers
from huggingface_hub import constants

import conftest
import matquant
from fake_hub import FakeHub, Request, serve
from matquant.cli import main
from matquant.export import export
from matquant.format.manifest import MANIFEST
from matquant.format.read import open_checkpoint
from matquant.hub.pull import pull
from matquant.hub.push import push
from test_plane_files import LAYER, assert_reads_like, content, make, message

# huggingface_hub 2.4 uploads large files with an argument that its HTTP client deprecates
WARNING = "ignore:Use 'content="
pytestmark = pytest.mark.filterwarnings(f"{WARNING}:DeprecationWarning")

REPO = "acme/tiny"
IDS = [1, 7, 42, 3, 250]
LFS_ROUTE = "/cdn/"


@pytest.fixture(scope="module")
def stock(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "stock"
    return conftest.quantize(llama, out, method="rtn", scope="all", affine="refit", group_size=16)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """An empty hub, which the client of this process uses, logged in."""
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2000)  # what an interrupted download may lose
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 120)
        monkeypatch.setenv("HF_TOKEN", "good")
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        hub.token = "good"
        yield hub


@pytest.fixture(scope="module")
def uploaded(stock: Path) -> dict[str, bytes]:
    """The files of a repository after push --planes, without a hub; test_push_replaces... compares them with a push."""
    parts = stock.with_name("planes")
    export(stock, parts, to="planes")
    return {**content(stock), **content(parts), "README.md": b"card"}


@pytest.fixture
def pushed(hub: FakeHub, uploaded: dict[str, bytes]) -> FakeHub:
    """The hub with the checkpoint and its planes."""
    hub.commit(REPO, dict(uploaded))
    return hub


def remote(hub: FakeHub, change: Callable[[dict[str, bytes]], None]) -> str:
    """Commit changed files by hand."""
    files = dict(hub.files(REPO))
    change(files)
    return hub.commit(REPO, files)


# --------------------------------------------------------------------------------------------------------------- push


def test_push_uploads_what_the_manifest_lists_in_one_commit(hub: FakeHub, stock: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stock, copy)
    (copy / "secret.txt").write_text("not listed")
    (copy / "LICENSE").write_text("free")
    made = push(copy, REPO, base_model="acme/float")
    listed = json.loads((stock / MANIFEST).read_text())["files"]
    files = hub.files(REPO)
    assert set(files) == {".gitattributes", MANIFEST, "README.md", "LICENSE", *listed}
    assert all(files[name] == (stock / name).read_bytes() for name in (MANIFEST, *listed))
    card = files["README.md"].decode()
    assert "base_model: acme/float\nbase_model_relation: quantized\nlibrary_name: matquant\n" in card
    assert card.count("\n| int") == 5
    assert "--planes" not in card
    assert len(hub.commits[REPO]) == 2
    assert made["deleted"] == []


def test_push_replaces_the_checkpoint_before_and_sends_nothing_twice(
    hub: FakeHub, stock: Path, uploaded: dict[str, bytes]
) -> None:
    push(stock, REPO, planes=True)
    files = hub.files(REPO)
    assert f"matquant pull {REPO} --bits 2 -o DIR" in files["README.md"].decode()
    assert {**files, "README.md": b"card"} == {**uploaded, ".gitattributes": files[".gitattributes"]}
    hub.log.clear()
    remote(hub, lambda files: files.update({"model-00001-of-00002.safetensors": b"x", "notes.md": b"kept"}))
    made = push(stock, REPO)
    planes = [name for name in files if name.startswith("planes/")]
    assert len(planes) == 7
    assert made["deleted"] == sorted(["model-00001-of-00002.safetensors", *planes])
    assert hub.files(REPO)["notes.md"] == b"kept"
    assert not any(name.startswith("planes/") for name in hub.files(REPO))
    assert not [request for request in hub.log if request.method == "PUT"]


@pytest.mark.slow
def test_a_card_shows_what_was_measured(hub: FakeHub, stock: Path, tmp_path: Path) -> None:
    record = tmp_path / "eval.json"
    record.write_text(json.dumps({"bits_per_weight": {"8": 8.1, "2": 2.1}, "log_perplexity": {"8": 1.0, "2": 2.0}}))
    push(stock, REPO, measured=record)
    card = hub.files(REPO)["README.md"].decode()
    assert "| perplexity |" in card
    assert "| 2.72 |" in card
    assert "| 7.39 |" in card


# --------------------------------------------------------------------------------------------------------------- pull


def test_int2_first_and_only_what_is_missing_later(pushed: FakeHub, stock: Path, tmp_path: Path) -> None:
    out, files = tmp_path / "out", pushed.files(REPO)
    made = pull(REPO, out, bits=2)
    assert made["max_bits"] == 2
    assert made["bytes"] == pushed.received()
    assert assert_reads_like(out, stock).max_bits == 2
    engine = matquant.Engine(out, threads=1)
    reference = matquant.Engine(stock, threads=1)
    assert np.array_equal(engine.score(IDS), reference.score(IDS, bits=2))
    for bits, planes in ((4, ["p1", "p2"]), (6, ["p3"])):
        pushed.log.clear()
        assert pull(REPO, out, bits=bits)["max_bits"] == bits
        assert pushed.fetched() == [f"planes/{plane}-00001.planes" for plane in planes]
        assert engine.add_planes() == bits
        assert np.array_equal(engine.score(IDS), reference.score(IDS, bits=bits))
    pushed.log.clear()
    made = pull(REPO, out, bits=8)
    assert pushed.fetched() == ["planes/p4-00001.planes"]
    assert made["bytes"] == len(files["planes/p4-00001.planes"])
    assert content(out) == content(stock)
    assert engine.add_planes() == 8
    assert np.array_equal(engine.score(IDS), reference.score(IDS, bits=8))
    pushed.log.clear()
    assert pull(REPO, out, bits=8)["bytes"] == 0
    assert pushed.fetched() == [MANIFEST]


@pytest.mark.slow
def test_a_pull_of_less_than_is_there_fetches_nothing(pushed: FakeHub, tmp_path: Path) -> None:
    pull(REPO, tmp_path / "out", bits=4)
    pushed.log.clear()
    assert pull(REPO, tmp_path / "out", bits=2)["max_bits"] == 4
    assert pushed.fetched() == []


def test_a_width_transfers_its_share_of_the_codes(hub: FakeHub, tmp_path: Path) -> None:
    """On a checkpoint of which most is codes: at most r/8 of the codes, plus the rest, plus 1 %."""
    stock = make(tmp_path / "stock", shapes={f"{LAYER}up_proj": (512, 1024), f"{LAYER}down_proj": (256, 2048)})
    push(stock, REPO, planes=True)
    codes, files = 2 * 512 * 1024, hub.files(REPO)
    listed = json.loads(files[MANIFEST])["files"]
    rest = sum(entry["bytes"] for entry in listed.values()) - codes + len(files[MANIFEST])
    for bits in (2, 3, 4, 6):
        hub.log.clear()
        pull(REPO, tmp_path / f"int{bits}", bits=bits)
        bound = 1.01 * (codes * bits / 8 + rest)
        assert codes * bits / 8 < hub.received() <= bound
        assert hub.received() > 1.01 * (codes * (bits - 1) / 8 + rest), "a narrower width's bound is not met"


def test_all_bits_of_a_new_directory_are_the_shards(pushed: FakeHub, stock: Path, tmp_path: Path) -> None:
    pull(REPO, tmp_path / "out")
    assert content(tmp_path / "out") == content(stock)
    assert not any(name.endswith(".planes") for name in pushed.fetched())


def test_a_repository_without_planes_gives_all_bits_only(hub: FakeHub, stock: Path, tmp_path: Path) -> None:
    push(stock, REPO)
    out = tmp_path / "out"
    assert message(pull, REPO, out, bits=2) == (
        f"{REPO} has no planes, so only all 8 bits can be fetched; "
        f"use --bits 8, or ask its owner for: matquant push DIR {REPO} --planes"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == []
    pull(REPO, out)
    assert content(out) == content(stock)


SLOW_PARTS = [pytest.param(part, marks=pytest.mark.slow) for part in ("planes/rest-00001.planes", "tokenizer.json")]


@pytest.mark.parametrize("part", ["planes/p0-00001.planes", *SLOW_PARTS])
def test_an_interrupted_pull_goes_on_in_the_middle_of_a_file(
    part: str, pushed: FakeHub, stock: Path, tmp_path: Path
) -> None:
    files = pushed.files(REPO)
    half = len(files[part]) // 2
    wanted = _addresses(pushed, part)
    answers = iter([half])

    def fault(request: Request) -> int | tuple[int, dict[str, str]] | None:
        redirects = part.endswith(".planes") and "/resolve/" in request.path
        return None if redirects or request.path not in wanted else next(answers, (503, {}))

    pushed.faults = fault
    out = tmp_path / "out"
    assert message(pull, REPO, out, bits=2) == "the hub answered 503 for acme/tiny; try again: what has arrived is kept"
    assert not (out / MANIFEST).exists()
    assert message(open_checkpoint, out) == (
        f"{out} is not complete: files are missing; fetch them with: matquant pull {REPO} --bits 2 -o {out}"
    )
    received = pushed.received()
    pushed.faults = lambda request: None
    pushed.log.clear()
    pull(REPO, out, bits=2)
    assert_reads_like(out, stock)
    resumed = [request.offset for request in pushed.log if request.path in wanted and request.sent]
    assert resumed
    assert resumed[0] > 0
    assert received + pushed.received() < sum(map(len, files.values()))


def _addresses(hub: FakeHub, part: str) -> set[str]:
    """The paths at which the bytes of a file are sent."""
    return {f"/cdn/{hashlib.sha256(hub.files(REPO)[part]).hexdigest()}", f"/{REPO}/resolve/{hub.newest[REPO]}/{part}"}


def test_a_lost_connection_is_tried_again(pushed: FakeHub, stock: Path, tmp_path: Path) -> None:
    wanted, cut = _addresses(pushed, "planes/p0-00001.planes"), iter([2000, 2000])

    def fault(request: Request) -> int | None:
        return next(cut, None) if request.path in wanted and request.path.startswith(LFS_ROUTE) else None

    pushed.faults = fault
    pull(REPO, tmp_path / "out", bits=2)
    assert_reads_like(tmp_path / "out", stock)
    assert [r.offset for r in pushed.log if r.path in wanted and r.path.startswith(LFS_ROUTE)] == [0, 2000, 4000]


def test_a_tampered_part_is_rejected_by_name_and_keeps_out(pushed: FakeHub, stock: Path, tmp_path: Path) -> None:
    out, part = tmp_path / "out", "planes/p1-00001.planes"
    pull(REPO, out, bits=2)
    before = content(out)
    data = pushed.files(REPO)[part]
    pushed.files(REPO)[part] = data[:-1] + bytes([data[-1] ^ 1])
    said = message(pull, REPO, out, bits=8)
    assert said.startswith(f"{part} of {REPO} at {pushed.newest[REPO][:12]} is damaged: sha256 ")
    assert said.endswith("; pull again, or ask its owner to push it again")
    assert content(out) == before
    pushed.files(REPO)[part] = data
    pull(REPO, out)
    assert content(out) == content(stock)


def test_a_moved_revision_does_not_mix(pushed: FakeHub, stock: Path, tmp_path: Path) -> None:
    out, first = tmp_path / "out", pushed.newest[REPO]
    pull(REPO, out, bits=2)
    second = remote(pushed, lambda files: files.update({"planes/p1-00001.planes": b"other", "config.json": b"{}"}))
    notices: list[str] = []
    pull(REPO, out, notice=notices.append)
    assert content(out) == content(stock)
    assert notices == [
        f"{REPO} has moved to {second[:12]}; {out} continues at {first[:12]}: pull into another -o for the new one"
    ]
    shutil.rmtree(out)
    pull(REPO, out, bits=2, revision=first)
    del pushed.commits[REPO][first]
    assert message(pull, REPO, out, bits=4) == (
        f"{REPO} on the hub has no revision {first}; give another, or pull into a new directory"
    )


def test_other_directories_are_left_alone(pushed: FakeHub, stock: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("x")
    assert message(pull, REPO, tmp_path / "full") == (
        f"{tmp_path}/full is not empty and was not pulled from {REPO}; use another -o"
    )
    pull(REPO, tmp_path / "out", bits=2)
    assert message(pull, "acme/other", tmp_path / "out") == (
        f"{tmp_path}/out holds a checkpoint from {REPO}; pull acme/other into another -o"
    )
    assert message(push, tmp_path / "out", REPO) == (
        f"{tmp_path}/out has the planes of int2 only, and all of them are needed; "
        f"fetch them with: matquant pull {REPO} --bits 8 -o {tmp_path}/out"
    )
    for name in ("tiny", "a/b/c", "../x", "a b/c"):
        assert message(pull, name, tmp_path / "new") == (
            f"{name!r} is not the name of a repository on the hub; give USER/REPO"
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_full_disk_keeps_what_has_arrived(pushed: FakeHub, stock: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with conftest.largest_file(20_000):
        assert "no space left on the device" in message(pull, REPO, out, bits=2)
    assert not (out / MANIFEST).exists()
    pull(REPO, out, bits=2)
    assert_reads_like(out, stock)


# ------------------------------------------------------------------------------------------------------- stock readers


def test_a_stock_from_pretrained_never_fetches_a_plane(pushed: FakeHub, stock: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(REPO)
    assert type(model).__name__ == "LlamaForCausalLM"
    fetched = pushed.fetched()
    assert "model.safetensors" in fetched
    assert not [name for name in fetched if "planes" in name]
    names = [name for name in pushed.files(REPO) if name.startswith("planes/")]
    for pattern in ("*.safetensors", "*.bin", "*.pt"):  # what vLLM and others download, in folders too
        assert not fnmatch.filter(names, pattern)


# -------------------------------------------------------------------------------------------------------------- errors


NOBODY = "this login may not use acme/tiny that way (403); log in with a token that may: hf auth login"
UNKNOWN = "acme/tiny is not on the hub, or is private ({}); check the name, or log in with: hf auth login"
WAIT = "the hub has had too many requests from here (429); try again in 7 s: what has arrived is kept"
LOGIN = "the hub does not accept this login (401); log in again with: hf auth login"
ERRORS = {
    "private": ((401, {"X-Error-Code": "RepoNotFound"}), UNKNOWN.format(401)),
    "login": ((401, {"X-Error-Message": "Invalid credentials in Authorization header"}), LOGIN),
    "forbidden": ((403, {}), NOBODY),
    "absent": ((404, {"X-Error-Code": "RepoNotFound"}), UNKNOWN.format(404)),
    "gated": (
        (403, {"X-Error-Code": "GatedRepo"}),
        "acme/tiny is a gated model; accept its terms on the hub and log in with: hf auth login",
    ),
    "busy": ((429, {"Retry-After": "7"}), WAIT),
    "broken": ((500, {}), "the hub answered 500 for acme/tiny; try again: what has arrived is kept"),
}


PULLS = [(case, route) for route in ("/api/models/", "/resolve/") for case in ERRORS]
PUSHES = [
    (c, r)
    for r in ("/create", "/commit/", "/preupload", "/objects/batch", "/put/")
    for c in ("busy", "login", "forbidden")
]
QUICK = [("private", "/api/models/"), ("absent", "/api/models/"), ("busy", "/resolve/"), ("forbidden", "/commit/")]


def some_slow(cases: list[tuple[str, str]]) -> list[Any]:
    """The cases, those that are not QUICK marked slow."""
    return [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("case", "route"), some_slow(PULLS))
def test_an_error_of_the_hub_is_one_sentence_and_leaves_the_directory(
    case: str, route: str, pushed: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    out = tmp_path / "out"
    pull(REPO, out, bits=2)
    before = content(out)
    answer, said = ERRORS[case]
    pushed.faults = lambda request: answer if route in request.path else None
    assert message(pull, REPO, out, bits=4) == said
    assert {name: data for name, data in content(out).items() if "incoming" not in name} == before
    fresh = tmp_path / "fresh"
    assert message(pull, REPO, fresh, bits=2) == said
    assert not (fresh / MANIFEST).exists()


@pytest.mark.parametrize(("case", "route"), some_slow(PUSHES))
def test_an_error_while_pushing_is_one_sentence_and_changes_nothing(
    case: str, route: str, hub: FakeHub, stock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    answer, said = ERRORS[case]
    hub.faults = lambda request: answer if route in request.path else None
    assert message(push, stock, REPO) == said
    assert set(hub.files(REPO) if REPO in hub.commits else {}) <= {".gitattributes"}


def test_the_command_line_pulls_and_explains(
    pushed: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["matquant", "pull", REPO, "--bits", "2", "-o", out])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"{out} serves int2 and narrower; received ")
    monkeypatch.setattr("sys.argv", ["matquant", "pull", "acme/none", "-o", out + "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {UNKNOWN.format(404).replace('tiny', 'none')}\n"


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert message(pull, REPO, tmp_path / "out").startswith("the hub cannot be reached for acme/tiny (")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- command line


def matquant_command(hub: FakeHub, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "good", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-W", WARNING, "-m", "matquant", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_the_commands_of_the_page(hub: FakeHub, stock: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = matquant_command(hub, "push", str(stock), REPO, "--planes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pushed ")
    assert f" to {REPO}: {hub.url}/{REPO}/commit/" in done.stdout
    done = matquant_command(hub, "pull", REPO, "--bits", "2", "-o", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out} serves int2 and narrower; received ")
    done = matquant_command(hub, "pull", "acme/none", "-o", str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: acme/none is not on the hub, or is private (404); check the name, or log in with: hf auth login\n"
    )
    done = matquant_command(hub, "pull", REPO, "-o", out)
    assert done.stdout.startswith(f"{out} serves int8 and narrower; received ")
    assert content(Path(out)) == content(stock)

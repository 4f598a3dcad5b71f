"""A server whose planes arrive while it runs: more widths, listed and served exactly, without a restart."""

import contextlib
import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import conftest
import matquant
from matquant.export import export
from matquant.format.plane_write import assemble
from matquant.serve import refine, run
from matquant.serve.app import make_app
from matquant.serve.limits import Limits
from matquant.serve.service import Service
from matquant.system.errors import InputError
from server_process import running
from serving import generation, starting
from serving import run as run_all

PROMPT = "Once upon"
PATIENT_S = 60.0


@pytest.fixture(scope="module")
def stock(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "tiny"
    return conftest.quantize(llama, out, method="rtn", scope="all", affine="refit", group_size=16)


@pytest.fixture
def partial(stock: Path, tmp_path: Path) -> Path:
    """A directory that has what int2 needs, and beside it one that has all."""
    export(stock, tmp_path / "whole", to="planes")
    shutil.copytree(tmp_path / "whole", tmp_path / "tiny", ignore=shutil.ignore_patterns("p[1-4]-*"))
    return tmp_path / "tiny"


def arrive(directory: Path, *planes: int) -> None:
    """Move planes into place, as a pull does."""
    for plane in planes:
        name = f"p{plane}-00001.planes"
        shutil.copy(directory.parent / "whole/planes" / name, directory / name)
        (directory / name).rename(directory / "planes" / name)


def settings(directory: Path, **options: Any) -> run.Settings:
    given: dict[str, Any] = {
        "engine": {"threads": 1, "max_bits": 8}, "batching": {"min_bits": 4}, "host": "127.0.0.1", "port": 0,
        "name": None, "widths": None, "plans": (), "context": None, "answer_tokens": 16, "api_keys": (),
        "origins": (), "hosts": (), "body_bytes": 2**20, "tool_form": None, "drain_s": 0.0,
    }  # fmt: skip
    return run.Settings(directory=directory, **{**given, **options})


@contextlib.contextmanager
def serving(directory: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[tuple[Service, TestClient]]:
    monkeypatch.setattr(refine, "POLL_S", 0.02)
    service = run._load(settings(directory, **options), "tiny", run._start, lambda text: None)
    try:
        with TestClient(make_app(service, Limits(hosts=("testserver",)))) as client:
            yield service, client
    finally:
        service.is_draining = True
        service.batcher.stop(0)


def names(client: TestClient) -> list[str]:
    return [entry["id"] for entry in client.get("/v1/models").json()["data"]]


def wait_for(client: TestClient, name: str) -> None:
    end = time.monotonic() + PATIENT_S
    while name not in names(client):
        assert time.monotonic() < end, names(client)
        time.sleep(0.02)


def complete(client: TestClient, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = client.post("/v1/completions", json=body).json()
    return {"text": answer["choices"][0]["text"], "served": answer["matquant"]["served"]}


def test_a_server_offers_more_widths_as_planes_arrive(
    stock: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = matquant.Engine(stock, threads=1)
    texts = {bits: reference.generate(PROMPT, bits=bits, max_tokens=12, temperature=0) for bits in (8, 4, 2)}
    assert len(set(texts.values())) == 3
    with serving(partial, monkeypatch) as (service, client):
        assert names(client) == ["tiny", "tiny:int2"]
        assert complete(client, "tiny")["served"] == [{"bits": 2, "tokens": 12}]
        assert complete(client, "tiny:int2")["text"] == texts[2]
        refused = client.post("/v1/completions", json={"model": "tiny:int4", "prompt": PROMPT})
        assert refused.status_code == 404
        arrive(partial, 1, 2)
        wait_for(client, "tiny:int4")
        assert names(client) == ["tiny", "tiny:int4", "tiny:int3", "tiny:int2"]
        assert complete(client, "tiny:int4")["text"] == texts[4]
        assert complete(client, "tiny")["served"] == [{"bits": 4, "tokens": 12}]
        arrive(partial, 3, 4)
        assemble(partial)
        wait_for(client, "tiny:int8")
        assert names(client)[1:] == [f"tiny:int{bits}" for bits in (8, 6, 4, 3, 2)]
        assert complete(client, "tiny")["served"] == [{"bits": 8, "tokens": 12}]
        assert complete(client, "tiny:int8")["text"] == texts[8]
        facts = {entry["id"]: entry["matquant"] for entry in client.get("/v1/models").json()["data"]}
        assert facts["tiny:int8"]["bits_per_weight"] > facts["tiny:int2"]["bits_per_weight"] > 2
        assert all(entry["tokens_per_s"] > 0 for entry in facts.values())
        assert service.models.max_bits == 8


def test_prompts_are_read_at_the_widths_that_have_arrived(partial: Path) -> None:
    engine = matquant.Engine(partial, threads=1)
    with starting(engine) as get:
        batcher = get(prefill_bits=8)
        for planes, widths in (((), [(2, None)]), ((1, 2), [(2, 4), (4, None)]), ((3, 4), [(2, 8), (4, 8), (8, None)])):
            arrive(partial, *planes)
            if 3 in planes:
                assemble(partial)
            engine.add_planes()
            for bits, expected in widths:
                one = run_all(batcher, generation([5, 6, 7, bits], bits=bits, max_tokens=2))[0]
                assert one.events[0].prompt_bits == expected


@pytest.mark.slow
def test_a_damaged_plane_is_reported_and_the_server_goes_on(
    partial: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(partial, monkeypatch, widths=(8, 3, 2)) as (_, client):
        file = partial / "planes/p1-00001.planes"
        data = bytearray((partial.parent / "whole/planes" / file.name).read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        end, said = time.monotonic() + PATIENT_S, ""
        while "is damaged" not in said:
            assert time.monotonic() < end
            said += capsys.readouterr().err
        assert f"serve: planes cannot be loaded: {file} is damaged: sha256 " in said
        assert names(client) == ["tiny", "tiny:int2"]
        assert complete(client, "tiny")["served"] == [{"bits": 2, "tokens": 12}]
        arrive(partial, 1)
        wait_for(client, "tiny:int3")


@pytest.mark.slow
def test_max_bits_and_widths_limit_what_is_offered(partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError) as caught:
        run._load(settings(partial, engine={"max_bits": 4}, widths=(8,)), "tiny", run._start, lambda text: None)
    assert str(caught.value) == "--widths has 8, above --max-bits 4; leave it out, or raise the limit"
    with serving(partial, monkeypatch, engine={"max_bits": 4, "threads": 1}) as (service, client):
        arrive(partial, 1, 2, 3, 4)
        wait_for(client, "tiny:int4")
        assert names(client) == ["tiny", "tiny:int4", "tiny:int3", "tiny:int2"]
        assert service.engine.max_bits == 4


@pytest.mark.slow
def test_a_server_process_is_refined_by_a_directory(stock: Path, partial: Path) -> None:
    def models(address: str) -> list[str]:
        with urllib.request.urlopen(f"{address}/v1/models", timeout=30) as answer:
            return [entry["id"] for entry in json.load(answer)["data"]]

    with running(partial) as server:
        assert models(server.address) == ["tiny", "tiny:int2"]
        arrive(partial, 1, 2, 3, 4)
        end = time.monotonic() + PATIENT_S
        while "tiny:int8" not in models(server.address):
            assert time.monotonic() < end
            time.sleep(0.2)

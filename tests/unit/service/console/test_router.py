"""What the page asks of the service: for its own project alone, and never more than it may."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

from megatrain.service.store import checkpoints, points, runs, sessions
from megatrain.service.store.records import Point
from megatrain.service.work.saves import key_of as key_of_files
from tests.unit.service.console.conftest import key_of
from tests.unit.service.store import rows

STATE = "/api/console/state"


async def fill(hub, project: str, name: str) -> None:
    """Give a project a session, a run with curves, and a checkpoint."""
    path = f"tinker://{name}:train:0/weights/one"
    record = rows.checkpoint(path, project, run_id=f"{name}:train:0")
    record = replace(record, location=key_of_files(path))
    await hub.store.write(
        sessions.add(rows.session(name, project, display_name=f"{project}'s")),
        runs.add(rows.run(f"{name}:train:0", project, session_id=name)),
        runs.progress(f"{name}:train:0", 4, 2, 5.0),
        points.add(
            [Point(f"{name}:train:0", step, 10.0 + step, "loss", 3.0 - step) for step in (1, 2)]
        ),
        checkpoints.put(record),
    )
    folder = hub.folder / "made" / name
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 70000)
    await hub.files.put_folder(record.location, folder)


def test_a_key_sees_what_is_its_projects_and_nothing_else(with_service) -> None:
    async def check(hub, client) -> None:
        await fill(hub, "alice", "s1")
        await fill(hub, "bob", "s2")
        alice = await key_of(hub, "alice")
        said = (await client.get(STATE, headers=alice)).json()
        assert [run["id"] for run in said["runs"]] == ["s1:train:0"]
        assert said["runs"][0] | {"label": "alice's · 0", "loss": 1.0, "step": 2} == said["runs"][0]
        assert [each["run"] for each in said["checkpoints"]] == ["s1:train:0"]
        assert (said["num_runs"], said["num_checkpoints"], said["num_bytes"]) == (1, 1, 10)
        assert "s2" not in (await client.get(STATE, headers=alice)).text
        theirs = "/api/console/runs/s2:train:0"
        body = {"step": 1, "values": {"reward": 0.5}}
        path = {"path": "tinker://s2:train:0/weights/one"}
        assert (await client.get(theirs, headers=alice)).status_code == 404
        assert (await client.post(f"{theirs}/points", json=body, headers=alice)).status_code == 404
        found = await client.get("/api/console/archive", params=path, headers=alice)
        assert found.status_code == 404

    with_service(check)


def test_without_a_key_there_is_the_page_and_nothing_in_it(with_service) -> None:
    async def check(hub, client) -> None:
        page = await client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert (await client.get("/api/console")).json() == {"keys": True}
        for path in (STATE, "/api/console/runs/a", "/api/console/archive?path=a"):
            assert (await client.get(path)).status_code == 401, path
        assert (await client.get("/console/assets/..%2frouter.py")).status_code == 404
        assert (await client.get("/console/assets/router.py")).status_code == 404

    with_service(check)


def test_what_has_not_changed_is_not_sent_again(with_service) -> None:
    async def check(hub, client) -> None:
        await fill(hub, "alice", "s1")
        alice = await key_of(hub, "alice")
        for path in (STATE, "/", "/api/console/runs/s1:train:0"):
            first = await client.get(path, headers=alice)
            known = alice | {"if-none-match": first.headers["etag"]}
            again = await client.get(path, headers=known)
            assert (again.status_code, again.content) == (304, b""), path
        await hub.store.write(runs.progress("s1:train:0", 5, 3, 6.0))
        assert (await client.get(STATE, headers=known)).status_code == 200

    with_service(check)


def test_clients_add_points_which_come_back_with_what_is_new(with_service) -> None:
    async def check(hub, client) -> None:
        await fill(hub, "alice", "s1")
        alice, reader = await key_of(hub, "alice"), await key_of(hub, "alice", "sample")
        run = "/api/console/runs/s1:train:0"
        before = (await client.get(run, headers=alice)).json()
        assert before["curves"] == {"loss": {"steps": [1, 2], "values": [2.0, 1.0]}}
        body = {"step": 2, "values": {"reward": 0.25, "kl": 0.5}}
        assert (await client.post(f"{run}/points", json=body, headers=alice)).status_code == 204
        since = {"since": before["until"] + 100}
        after = (await client.get(run, headers=alice, params=since)).json()
        assert after["curves"] == {
            "kl": {"steps": [2], "values": [0.5]},
            "reward": {"steps": [2], "values": [0.25]},
        }
        assert (await client.post(f"{run}/points", json=body, headers=reader)).status_code == 403
        for values, status in (
            ({"loss": 1.0}, 400),
            ({"a b": 1.0}, 422),
            ({}, 422),
            ({f"n{i}": 1.0 for i in range(33)}, 422),
        ):
            body = {"step": 1, "values": values}
            found = await client.post(f"{run}/points", json=body, headers=alice)
            assert found.status_code == status, values

    with_service(check)


def test_a_checkpoint_is_downloaded_as_one_tar_without_a_key(with_service, tmp_path: Path) -> None:
    async def check(hub, client) -> None:
        await fill(hub, "alice", "s1")
        alice = await key_of(hub, "alice")
        path = {"path": "tinker://s1:train:0/weights/one"}
        said = (await client.get("/api/console/archive", params=path, headers=alice)).json()
        found = await client.get(said["url"])
        assert found.headers["content-type"] == "application/x-tar"
        assert int(found.headers["content-length"]) == len(found.content)
        assert found.headers["content-disposition"].endswith('"s1_train_0_weights_one.tar"')
        with tarfile.open(fileobj=io.BytesIO(found.content)) as archive:
            file = archive.extractfile("adapter_model.safetensors")
            assert file is not None
            assert file.read() == b"x" * 70000
            assert archive.getnames() == ["adapter_config.json", "adapter_model.safetensors"]

    with_service(check)


def test_a_ticket_for_a_file_is_none_for_a_checkpoint_nor_the_other_way_round(with_service) -> None:
    async def check(hub, client) -> None:
        await fill(hub, "alice", "s1")
        alice = await key_of(hub, "alice")
        path = {"path": "tinker://s1:train:0/weights/one"}
        said = (await client.get("/api/console/archive", params=path, headers=alice)).json()
        whole = said["url"].rpartition("/")[2]
        one, _ = hub.signer.sign("s1_train_0/weights/one", "adapter_config.json")
        assert (await client.get(f"/api/v1/files/{whole}")).status_code == 404
        assert (await client.get(f"/api/console/archive/{one}")).status_code == 404
        assert (await client.get(f"/api/console/archive/{whole[:-2]}AA")).status_code == 401

    with_service(check)

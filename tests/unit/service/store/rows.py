"""Rows for tests of the store."""

from megatrain.service.store.records import Checkpoint, Request, Run, SamplingSession, Session, Used


def request(name: str, project: str = "mine", *, run: str | None = None, seq: int = 0) -> Request:
    """Return a request that waits."""
    return Request(
        id=name,
        project=project,
        key_id=1,
        session="s",
        run=run,
        kind="optim_step",
        seq=seq,
        idem=f"idem:{name}",
        payload=b"body",
        created=1.0,
    )


def session(name: str, project: str = "mine", created: float = 1.0, **more: str) -> Session:
    """Return a session."""
    return Session(
        id=name,
        project=project,
        key_id=1,
        tags=("a", "b"),
        user_metadata={"deep": {"list": [1, 2.5, None]}},
        created=created,
        last_seen=created,
        **more,  # type: ignore[arg-type]
    )


def run(name: str, project: str = "mine", created: float = 1.0, session_id: str = "s") -> Run:
    """Return a run."""
    return Run(
        id=name,
        session=session_id,
        project=project,
        base_model="base",
        adapter=name,
        is_lora=True,
        lora_rank=8,
        lora={"seed": 3},
        created=created,
        last_request=created,
    )


def checkpoint(
    path: str,
    project: str = "mine",
    *,
    run_id: str = "r",
    created: float = 1.0,
    public: bool = False,
    expires: float | None = None,
    kind: str = "training",
) -> Checkpoint:
    """Return a checkpoint."""
    return Checkpoint(
        path=path,
        run=run_id,
        project=project,
        kind=kind,
        name=path.rsplit("/", 1)[-1],
        created=created,
        size_bytes=10,
        public=public,
        expires=expires,
        base_model="base",
        location=path.removeprefix("tinker://"),
    )


def sampler(name: str, project: str = "mine", session_id: str = "s") -> SamplingSession:
    """Return a sampling session."""
    return SamplingSession(
        id=name, session=session_id, project=project, base_model="base", created=1.0
    )


def used(project: str, session_id: str, hour: int = 3600) -> Used:
    """Return what a session has used in an hour."""
    return Used(
        hour=hour,
        project=project,
        session=session_id,
        base_model="base",
        kind="training",
        tokens=7,
    )

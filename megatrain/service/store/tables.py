"""The tables, as SQLAlchemy knows them; a migration makes each change of them."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

projects = Table(
    "projects",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("created", Float, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("project", String(64), nullable=False, index=True),
    Column("name", String(200), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("prefix", String(16), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
    Column("last_used", Float),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("project", String(64), nullable=False),
    Column("key_id", Integer, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("display_name", String(200)),
    Column("sdk_version", String(64), nullable=False),
    Column("created", Float, nullable=False),
    Column("last_seen", Float, nullable=False),
    Column("status", String(16), nullable=False, index=True),
    Column("detail", Text),
    Index("sessions_by_project", "project", "created"),
)

runs = Table(
    "runs",
    metadata,
    Column("id", String(96), primary_key=True),
    Column("session", String(64), nullable=False, index=True),
    Column("project", String(64), nullable=False),
    Column("base_model", String(200), nullable=False),
    Column("adapter", String(96), nullable=False),
    Column("is_lora", Boolean, nullable=False),
    Column("lora_rank", Integer, nullable=False),
    Column("lora", JSON, nullable=False),
    Column("optimizer", JSON, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("created", Float, nullable=False),
    Column("last_request", Float, nullable=False),
    Column("next_seq", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("source", String(300)),
    Column("corrupted", Boolean, nullable=False),
    Index("runs_by_project", "project", "created"),
)

requests = Table(
    "requests",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("project", String(64), nullable=False),
    Column("key_id", Integer, nullable=False),
    Column("session", String(64), nullable=False),
    Column("run", String(96)),
    Column("sampler", String(96)),
    Column("kind", String(32), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("idem", String(200), nullable=False, unique=True),
    Column("payload", LargeBinary, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("result", LargeBinary),
    Column("result_type", String(8), nullable=False),
    Column("created", Float, nullable=False),
    Column("finished", Float, index=True),
    Column("tokens", BigInteger, nullable=False),
    Index("requests_by_run", "run", "seq"),
    Index("requests_by_sampler", "sampler", "finished"),
)

samplers = Table(
    "samplers",
    metadata,
    Column("id", String(96), primary_key=True),
    Column("session", String(64), nullable=False, index=True),
    Column("project", String(64), nullable=False),
    Column("base_model", String(200), nullable=False),
    Column("model_path", String(300)),
    Column("run", String(96)),
    Column("version", Integer),
    Column("directory", Text),
    Column("kind", String(16), nullable=False),
    Column("created", Float, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("path", String(300), primary_key=True),
    Column("run", String(96), nullable=False, index=True),
    Column("project", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("name", String(200), nullable=False),
    Column("created", Float, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("public", Boolean, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("expires", Float, index=True),
    Column("base_model", String(200), nullable=False),
    Column("lora", JSON, nullable=False),
    Column("optimizer", JSON, nullable=False),
    Column("step", Integer, nullable=False),
    Column("location", String(400), nullable=False),
    Column("state", String(16), nullable=False),
    Index("checkpoints_by_project", "project", "created"),
)

usage = Table(
    "usage",
    metadata,
    Column("day", String(10), primary_key=True),
    Column("project", String(64), primary_key=True),
    Column("key_id", Integer, primary_key=True),
    Column("kind", String(32), primary_key=True),
    Column("tokens", BigInteger, nullable=False),
    Column("requests", BigInteger, nullable=False),
)

usage_hours = Table(
    "usage_hours",
    metadata,
    Column("hour", BigInteger, primary_key=True),
    Column("project", String(64), primary_key=True),
    Column("session", String(64), primary_key=True),
    Column("base_model", String(200), primary_key=True),
    Column("kind", String(32), primary_key=True),
    Column("tokens", BigInteger, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("time", Float, nullable=False, index=True),
    Column("project", String(64), nullable=False, index=True),
    Column("key_id", Integer, nullable=False),
    Column("action", String(64), nullable=False),
    Column("object", String(300), nullable=False),
    Column("address", String(64), nullable=False),
    Column("outcome", String(64), nullable=False),
)

points = Table(
    "points",
    metadata,
    Column("run", String(96), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("time", Float, nullable=False),
    Column("value", Float, nullable=False),
)

writers = Table(
    "writers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("time", Float, nullable=False),
)

"""Settings, from the environment. Names are in docs/OPERATIONS.md, and a test
fails when one is missing there.

Engines that are not configured are started by us (`tributary up`): PostgreSQL from the wheel,
anvil, Ray. Everything they keep lies under `home`.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ledger.errors import ConfigError

Port = Annotated[int, Field(ge=0, le=65_535)]


class Settings(BaseSettings):
    """One ledger instance. Times are in seconds, money in wei."""

    model_config = SettingsConfigDict(
        env_prefix="TRIBUTARY_", extra="ignore", frozen=True, populate_by_name=True
    )

    home: Path = Path(".tributary")
    log_origin: str = Field("localhost/tributary", pattern=r"^[^\s+]{1,128}$")
    name: str = "Tributary"
    host: str = "127.0.0.1"
    port: Port = 8420

    inclusion_promise_s: int = Field(60, ge=1, le=86_400)

    database_url: str | None = Field(None, validation_alias="DATABASE_URL")
    blob_url: str | None = None

    chain_rpc_url: str | None = Field(None, validation_alias="CHAIN_RPC_URL")
    chain_key_file: Path | None = None
    dev_chain: bool = False
    chain_confirmations: int = Field(1, ge=1, le=1_000)
    anchor_interval_s: float = Field(15.0, gt=0)
    challenge_window_s: int = Field(3, ge=0)

    ray_address: str | None = Field(None, validation_alias="RAY_ADDRESS")
    ray_cpus: int = Field(default_factory=lambda: max(2, os.cpu_count() or 2), ge=1)
    base_model: str | None = None
    serving_replicas: int = Field(1, ge=1, le=64)
    serving_host: str | None = None
    serving_keep: str | None = None

    witness_policy: Path | None = None
    witness_required: bool = False
    witness_timeout_s: float = Field(2.0, gt=0, le=60)

    max_body_bytes: int = Field(64 * 2**20, ge=1_024)
    max_tokens_per_answer: int = Field(256, ge=1)
    answer_timeout_s: float = Field(120.0, gt=0, le=3_600)
    requests_per_minute: int = Field(6_000, ge=1)

    @cached_property
    def root(self) -> Path:
        """`home`, absolute."""
        return self.home.expanduser().absolute()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def blobs_at(self) -> str:
        return self.blob_url or str(self.root / "blobs")

    def key_file(self, name: str) -> Path:
        """Key files live in `home`/keys, mode 0600: operator, log, worker, chain, ..."""
        return self.root / "keys" / f"{name}.key"

    def environment(self) -> dict[str, str]:
        """These settings as environment variables, for a child process."""
        found = {}
        for name, spec in type(self).model_fields.items():
            value = getattr(self, name)
            if value is not None:
                variable = spec.validation_alias or f"TRIBUTARY_{name.upper()}"
                found[str(variable)] = str(self.root if name == "home" else value)
        return found


def load_settings(**overrides: object) -> Settings:
    """Settings, or a ConfigError that names the setting and the reason."""
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"setting {name}: {first['msg']}; see docs/OPERATIONS.md") from error

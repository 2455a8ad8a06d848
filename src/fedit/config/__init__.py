"""The run description: TOML and overrides -> one frozen `RunConfig`, validated once, before anything is loaded."""

from fedit.config.command import override_value, run_command, toml
from fedit.config.explaining import explain
from fedit.config.loading import (
    apply_overrides,
    load_config,
    load_plugins,
    parse_config,
    recorded_config,
    shipped_recipes,
    shipped_studies,
)
from fedit.config.privacy import PrivacyConfig, SecureAggregationConfig
from fedit.config.run import RunConfig
from fedit.config.tables import (
    COLUMNS,
    AdapterConfig,
    ClientConfig,
    CodecConfig,
    CohortConfig,
    DataConfig,
    DType,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    RankRange,
    Table,
)

__all__ = [
    "COLUMNS",
    "AdapterConfig",
    "ClientConfig",
    "CodecConfig",
    "CohortConfig",
    "DType",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ModelConfig",
    "PrivacyConfig",
    "RankRange",
    "RunConfig",
    "SecureAggregationConfig",
    "Table",
    "apply_overrides",
    "explain",
    "load_config",
    "load_plugins",
    "override_value",
    "parse_config",
    "recorded_config",
    "run_command",
    "shipped_recipes",
    "shipped_studies",
    "toml",
]

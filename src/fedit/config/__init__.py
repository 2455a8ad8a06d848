"""The run description: TOML and overrides -> one frozen `RunConfig`, validated once, before anything is loaded."""

from fedit.config.explaining import explain
from fedit.config.loading import (
    apply_overrides,
    load_config,
    load_plugins,
    parse_config,
    shipped_recipes,
    shipped_studies,
)
from fedit.config.tables import (
    COLUMNS,
    AdapterConfig,
    ClientConfig,
    CohortConfig,
    DataConfig,
    DType,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    RankRange,
    RunConfig,
    Table,
)

__all__ = [
    "COLUMNS",
    "AdapterConfig",
    "ClientConfig",
    "CohortConfig",
    "DType",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ModelConfig",
    "RankRange",
    "RunConfig",
    "Table",
    "apply_overrides",
    "explain",
    "load_config",
    "load_plugins",
    "parse_config",
    "shipped_recipes",
    "shipped_studies",
]

"""Names that users choose from. The command line lists them without importing JAX."""

AUTO = "auto"
"""Choice that leaves the decision to the policy."""
COMBINES = ("scatter", "reduce", "ragged", "all-to-all")
"""Strategies that combine the outputs of feed-forward blocks."""
RESIDUAL_LAYOUTS = ("whole", "split")
"""Layouts of the residual rows."""
GATHER_DTYPES = ("exact", "float8_e4m3fn", "int8")
"""Precisions of gathered rows."""
TARGETS = ("a100", "h100", "h200", "b200", "gb200")
"""GPUs that programs are compiled for without a GPU."""

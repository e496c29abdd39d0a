"""The C++ core as bindings/python.cpp gives it: addresses, strides and sizes are integers; address 0 means none.

Strides count elements, those of packed rows bytes. Codes are positions in `dtypes`, `masks` and `activations`.
`threads` 0 is the library's default. Errors: TypeError (dtype, layout), ValueError (value, shape), NotImplementedError
(no kernel), RuntimeError (device). The global lock is released while kernels run.
"""

# fmt: off
dtypes: tuple[str, ...]
masks: tuple[str, ...]
activations: tuple[str, ...]

def mask_forward(
    act: int,
    slope: float,
    dtype: int,
    rows: int,
    cols: int,
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    packed: int,
    packed_stride: int,
    threads: int,
) -> None: ...
def mask_backward(
    act: int,
    slope: float,
    dtype: int,
    rows: int,
    cols: int,
    dy: int,
    dy_stride: int,
    packed: int,
    packed_stride: int,
    dx: int,
    dx_stride: int,
    threads: int,
) -> None: ...
def activation_forward(
    act: int, dtype: int, rows: int, cols: int, x: int, x_stride: int, y: int, y_stride: int, threads: int
) -> None: ...
def activation_backward(
    act: int,
    dtype: int,
    rows: int,
    cols: int,
    x: int,
    x_stride: int,
    dy: int,
    dy_stride: int,
    dx: int,
    dx_stride: int,
    threads: int,
) -> None: ...
def gated_forward(
    act: int,
    dtype: int,
    rows: int,
    cols: int,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    h: int,
    h_stride: int,
    threads: int,
) -> None: ...
def gated_backward(
    act: int,
    dtype: int,
    rows: int,
    cols: int,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    dh: int,
    dh_stride: int,
    dgate: int,
    dgate_stride: int,
    dup: int,
    dup_stride: int,
    h: int,
    h_stride: int,
    threads: int,
) -> None: ...
def rms_norm_forward(
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    rstd_given: bool,
    rows: int,
    cols: int,
    x_dtype: int,
    x: int,
    x_stride: int,
    weight_dtype: int,
    weight: int,
    y_dtype: int,
    y: int,
    y_stride: int,
    rstd: int,
    threads: int,
) -> None: ...
def rms_norm_backward(
    weight_offset: float,
    cast_before_weight: bool,
    rows: int,
    cols: int,
    x_dtype: int,
    x: int,
    x_stride: int,
    weight_dtype: int,
    weight: int,
    rstd: int,
    dy_dtype: int,
    dy: int,
    dy_stride: int,
    dx: int,
    dx_stride: int,
    dw: int,
    threads: int,
) -> None: ...
def cross_entropy(
    dtype: int,
    rows: int,
    cols: int,
    logits: int,
    logits_stride: int,
    labels: int,
    class_weight: int,
    row_scale: int,
    gradient_scale: float,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    write_gradient: bool,
    loss: int,
    lse: int,
    threads: int,
) -> None: ...
def philox_fill(out: int, n: int, seed: int, offset: int, threads: int) -> None: ...
def dropout(
    p: float,
    seed: int,
    offset: int,
    dtype: int,
    rows: int,
    cols: int,
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    threads: int,
) -> None: ...
def xla_targets() -> dict[str, object]: ...  # name → capsule of the handler
def backend_names() -> tuple[str, ...]: ...
def backend_runs_here(name: str) -> bool: ...
def current_backend() -> str: ...
def use_backend(name: str) -> None: ...
def default_threads() -> int: ...
def version() -> str: ...

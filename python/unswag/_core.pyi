"""The C++ core as bindings/python.cpp gives it: addresses, strides and sizes are integers; address 0 means none.

Strides count elements, those of packed rows bytes. Codes are positions in `dtypes`, `masks`, `activations` and `blocks`.
Work runs on `device`: -1, the CPU, on `threads` threads (0: the library's default), or a CUDA device, where it is queued in the
stream of the handle `stream` and every address is memory of that device. Errors: TypeError (dtype, layout), ValueError (value,
shape), NotImplementedError (no kernel), RuntimeError (device). The global lock is released while kernels run.
"""

# fmt: off
dtypes: tuple[str, ...]
masks: tuple[str, ...]
activations: tuple[str, ...]
blocks: tuple[str, ...]

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
    device: int,
    stream: int,
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
    device: int,
    stream: int,
    threads: int,
) -> None: ...
def activation_forward(
    act: int,
    dtype: int,
    rows: int,
    cols: int,
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    device: int,
    stream: int,
    threads: int,
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
    device: int,
    stream: int,
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
    device: int,
    stream: int,
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
    device: int,
    stream: int,
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
    device: int,
    stream: int,
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
    scratch: int,
    device: int,
    stream: int,
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
    device: int,
    stream: int,
    threads: int,
) -> None: ...
def block_encode(
    codec: int,
    stochastic: bool,
    seed: int,
    offset: int,
    dtype: int,
    rows: int,
    cols: int,
    x: int,
    x_stride: int,
    packed: int,
    packed_stride: int,
    device: int,
    stream: int,
    threads: int,
) -> None: ...
def block_decode(
    codec: int,
    dtype: int,
    rows: int,
    cols: int,
    packed: int,
    packed_stride: int,
    x: int,
    x_stride: int,
    device: int,
    stream: int,
    threads: int,
) -> None: ...
def block_row_bytes(codec: int, cols: int) -> int: ...
def philox_fill(out: int, n: int, seed: int, offset: int, device: int, stream: int, threads: int) -> None: ...
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
    device: int,
    stream: int,
    threads: int,
) -> None: ...
def rms_norm_backward_scratch(rows: int, cols: int) -> int: ...  # bytes; needed on a device, with dw
def cuda_problem(device: int) -> str: ...  # "" or why kernels cannot run on this device, and what to do
def cuda_architectures() -> tuple[str, ...]: ...  # () where this build has no CUDA kernels
def xla_targets() -> dict[str, dict[str, object]]: ...  # XLA's platform → name → capsule of the handler
def backend_names() -> tuple[str, ...]: ...
def backend_runs_here(name: str) -> bool: ...
def current_backend() -> str: ...
def use_backend(name: str) -> None: ...
def default_threads() -> int: ...
def version() -> str: ...

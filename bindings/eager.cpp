// The ops that a training step calls most, on PyTorch's tensors and past its dispatcher, which costs more than the kernel of a
// short sequence.  Each does what the kernel of the same name in unswag/torch/ops does, and says NotImplemented wherever
// something is out of the ordinary (`Torch::rows`, `Torch::is_eager`, shapes that do not fit): then that kernel runs, and it
// says what is wrong.
#include <nanobind/stl/string_view.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "common.hpp"
#include "torch.hpp"

namespace unswag::python {

using namespace nb::literals;

namespace {

nb::object not_implemented() { return nb::borrow(Py_NotImplemented); }

std::optional<Activation> activation_of(std::string_view name) {
  for (const auto& [act, known] : activations)
    if (known == name) return act;
  return std::nullopt;
}

// A vector of the size of x's last dimension beside x, or none where `vector` is None.
struct Affine {
  bool fits;
  ConstVector vector{};
};
Affine affine(const Torch& torch, nb::handle vector, const TensorRows& x) {
  if (vector.is_none()) return {true};
  const std::optional<TensorRows> v = torch.rows(vector);
  if (!v || v->tensor.ndim != 1 || v->cols != x.cols || !v->is_beside(x)) return {false};
  return {true, v->vector()};
}

// One number per row of x, as a forward made it.
std::optional<ConstVector> statistic(const Torch& torch, nb::handle vector, const TensorRows& x) {
  const std::optional<TensorRows> v = torch.rows(vector);
  const auto rows = x.shape().first(x.shape().size() - 1);
  if (!v || !v->is_beside(x) || v->dtype != wide(x.dtype) || !std::ranges::equal(v->shape(), rows)) return std::nullopt;
  if (v->rows != 1 && v->stride != v->cols) return std::nullopt;
  return ConstVector{v->tensor.data, v->dtype, x.rows};
}

// y of a norm: like x, in `out_dtype` if that is not None; none for a dtype without kernels.
std::optional<nb::object> new_y(const Torch& torch, nb::handle x_, const TensorRows& x, nb::handle out_dtype) {
  const std::optional<DType> dtype = out_dtype.is_none() ? x.dtype : torch.dtype(out_dtype);
  if (!dtype) return std::nullopt;
  return *dtype == x.dtype ? torch.empty_like(x_) : torch.empty_like(x_, out_dtype);
}

// A gradient of a norm: of no elements where it is not needed, as the ops return it.
struct Gradient {
  nb::object tensor;
  bool needed;
};
Gradient new_dx(const Torch& torch, nb::handle x_, const TensorRows& x, bool needed) {
  const std::int64_t none = 0;
  return {needed ? torch.empty_like(x_) : torch.empty({&none, 1}, x.dtype, x_), needed};
}
Gradient new_sum(const Torch& torch, nb::handle x_, const TensorRows& x, bool needed) {
  const std::int64_t cols = needed ? x.cols : 0;
  return {torch.empty({&cols, 1}, wide(x.dtype), x_), needed};
}
Rows rows_of(const Torch& torch, const Gradient& dx, const TensorRows& x) {
  return dx.needed ? torch.made(dx.tensor).out() : Rows{nullptr, x.dtype, x.rows, x.cols, x.cols};
}
Vector vector_of(const Torch& torch, const Gradient& sum, const TensorRows& x) {
  return {sum.needed ? torch.made(sum.tensor).tensor.data : nullptr, wide(x.dtype), x.cols};
}

// ---- RMSNorm

struct RmsNorm {
  double weight_offset;
  bool cast_before_weight;
};

// y, and rstd unless it is given.
nb::object rms_norm(nb::handle x_, nb::handle rstd_, nb::handle weight_, double eps, RmsNorm how, nb::handle out_dtype) {
  const Torch& torch = Torch::get();
  if (!torch.is_eager()) return not_implemented();
  const std::optional<TensorRows> x = torch.rows(x_);
  if (!x || x->tensor.ndim == 0) return not_implemented();
  const Affine weight = affine(torch, weight_, *x);
  if (!weight.fits) return not_implemented();
  const bool given = rstd_.is_valid();
  const nb::object rstd = given ? nb::borrow(rstd_) : torch.empty(x->shape().first(x->shape().size() - 1), wide(x->dtype), x_);
  const std::optional<ConstVector> per_row = statistic(torch, rstd, *x);
  const std::optional<nb::object> y = new_y(torch, x_, *x, out_dtype);
  if (!per_row || !y) return not_implemented();
  run<RmsNormForward>(rms_norm_forward,
                      {.x = x->in(),
                       .weight = weight.vector,
                       .eps = eps,
                       .weight_offset = how.weight_offset,
                       .cast_before_weight = how.cast_before_weight,
                       .rstd_given = given,
                       .y = torch.made(*y).out(),
                       .rstd = {const_cast<void*>(per_row->data), per_row->dtype, per_row->size}},
                      torch.stream(*x));
  return given ? *y : nb::make_tuple(*y, rstd);
}

nb::object rms_norm_forward_(nb::handle x, nb::handle weight, double eps, double weight_offset, bool cast_before_weight,
                             nb::handle out_dtype) {
  return rms_norm(x, nb::handle(), weight, eps, {weight_offset, cast_before_weight}, out_dtype);
}

nb::object rms_norm_apply_(nb::handle x, nb::handle rstd, nb::handle weight, double weight_offset, bool cast_before_weight,
                           nb::handle out_dtype) {
  return rms_norm(x, rstd, weight, 0.0, {weight_offset, cast_before_weight}, out_dtype);
}

nb::object rms_norm_backward_(nb::handle x_, nb::handle rstd, nb::handle weight_, nb::handle dy_, double weight_offset,
                              bool cast_before_weight, bool need_dx, bool need_dw) {
  const Torch& torch = Torch::get();
  if (!torch.is_eager()) return not_implemented();
  const std::optional<TensorRows> x = torch.rows(x_), dy = torch.rows(dy_);
  if (!x || !dy || x->tensor.ndim == 0 || !dy->is_shaped_like(*x)) return not_implemented();
  const Affine weight = affine(torch, weight_, *x);
  const std::optional<ConstVector> per_row = statistic(torch, rstd, *x);
  if (!weight.fits || !per_row) return not_implemented();
  const Stream stream = torch.stream(*x);
  if (stream.device >= 0) return not_implemented();  // which needs scratch memory
  const Gradient dx = new_dx(torch, x_, *x, need_dx), dw = new_sum(torch, x_, *x, need_dw);
  run<RmsNormBackward>(rms_norm_backward,
                       {.x = x->in(),
                        .weight = weight.vector,
                        .rstd = *per_row,
                        .dy = dy->in(),
                        .weight_offset = weight_offset,
                        .cast_before_weight = cast_before_weight,
                        .dx = rows_of(torch, dx, *x),
                        .dw = vector_of(torch, dw, *x)},
                       stream);
  return nb::make_tuple(dx.tensor, dw.tensor);
}

// ---- LayerNorm

nb::object layer_norm(nb::handle x_, nb::handle mean_, nb::handle rstd_, nb::handle weight_, nb::handle bias_, double eps,
                      nb::handle out_dtype) {
  const Torch& torch = Torch::get();
  if (!torch.is_eager()) return not_implemented();
  const std::optional<TensorRows> x = torch.rows(x_);
  if (!x || x->tensor.ndim == 0) return not_implemented();
  const Affine weight = affine(torch, weight_, *x), bias = affine(torch, bias_, *x);
  if (!weight.fits || !bias.fits) return not_implemented();
  const bool given = mean_.is_valid();
  const auto per_row = x->shape().first(x->shape().size() - 1);
  const nb::object mean = given ? nb::borrow(mean_) : torch.empty(per_row, wide(x->dtype), x_);
  const nb::object rstd = given ? nb::borrow(rstd_) : torch.empty(per_row, wide(x->dtype), x_);
  const std::optional<ConstVector> m = statistic(torch, mean, *x), r = statistic(torch, rstd, *x);
  const std::optional<nb::object> y = new_y(torch, x_, *x, out_dtype);
  if (!m || !r || !y) return not_implemented();
  run<LayerNormForward>(layer_norm_forward,
                        {.x = x->in(),
                         .weight = weight.vector,
                         .bias = bias.vector,
                         .eps = eps,
                         .statistics_given = given,
                         .y = torch.made(*y).out(),
                         .mean = {const_cast<void*>(m->data), m->dtype, m->size},
                         .rstd = {const_cast<void*>(r->data), r->dtype, r->size}},
                        torch.stream(*x));
  return given ? *y : nb::make_tuple(*y, mean, rstd);
}

nb::object layer_norm_forward_(nb::handle x, nb::handle weight, nb::handle bias, double eps, nb::handle out_dtype) {
  return layer_norm(x, nb::handle(), nb::handle(), weight, bias, eps, out_dtype);
}

nb::object layer_norm_apply_(nb::handle x, nb::handle mean, nb::handle rstd, nb::handle weight, nb::handle bias,
                             nb::handle out_dtype) {
  return layer_norm(x, mean, rstd, weight, bias, 0.0, out_dtype);
}

nb::object layer_norm_backward_(nb::handle x_, nb::handle mean, nb::handle rstd, nb::handle weight_, nb::handle dy_,
                                bool need_dx, bool need_dw, bool need_db) {
  const Torch& torch = Torch::get();
  if (!torch.is_eager()) return not_implemented();
  const std::optional<TensorRows> x = torch.rows(x_), dy = torch.rows(dy_);
  if (!x || !dy || x->tensor.ndim == 0 || !dy->is_shaped_like(*x)) return not_implemented();
  const Affine weight = affine(torch, weight_, *x);
  const std::optional<ConstVector> m = statistic(torch, mean, *x), r = statistic(torch, rstd, *x);
  if (!weight.fits || !m || !r) return not_implemented();
  const Stream stream = torch.stream(*x);
  if (stream.device >= 0) return not_implemented();  // which needs scratch memory
  const Gradient dx = new_dx(torch, x_, *x, need_dx);
  const Gradient dw = new_sum(torch, x_, *x, need_dw), db = new_sum(torch, x_, *x, need_db);
  run<LayerNormBackward>(layer_norm_backward,
                         {.x = x->in(),
                          .weight = weight.vector,
                          .mean = *m,
                          .rstd = *r,
                          .dy = dy->in(),
                          .dx = rows_of(torch, dx, *x),
                          .dw = vector_of(torch, dw, *x),
                          .db = vector_of(torch, db, *x)},
                         stream);
  return nb::make_tuple(dx.tensor, dw.tensor, db.tensor);
}

// ---- activations

nb::object activation_forward_(nb::handle x_, std::string_view act) {
  const Torch& torch = Torch::get();
  const std::optional<Activation> code = activation_of(act);
  if (!code || !torch.is_eager()) return not_implemented();
  const std::optional<TensorRows> x = torch.rows(x_);
  if (!x) return not_implemented();
  nb::object y = torch.empty_like(x_);
  run<ActivationForward>(activation_forward, {.act = *code, .x = x->in(), .y = torch.made(y).out()}, torch.stream(*x));
  return y;
}

nb::object activation_backward_(nb::handle x_, nb::handle dy_, std::string_view act) {
  const Torch& torch = Torch::get();
  const std::optional<Activation> code = activation_of(act);
  if (!code || !torch.is_eager()) return not_implemented();
  const std::optional<TensorRows> x = torch.rows(x_), dy = torch.rows(dy_);
  if (!x || !dy || !dy->is_like(*x)) return not_implemented();
  nb::object dx = torch.empty_like(x_);
  run<ActivationBackward>(activation_backward, {.act = *code, .x = x->in(), .dy = dy->in(), .dx = torch.made(dx).out()},
                          torch.stream(*x));
  return dx;
}

// ---- gated units

nb::object gated_forward_(nb::handle gate_, nb::handle up_, std::string_view act) {
  const Torch& torch = Torch::get();
  const std::optional<Activation> code = activation_of(act);
  if (!code || !torch.is_eager()) return not_implemented();
  const std::optional<TensorRows> gate = torch.rows(gate_), up = torch.rows(up_);
  if (!gate || !up || !up->is_like(*gate)) return not_implemented();
  nb::object h = torch.empty_like(gate_);
  run<GatedForward>(gated_forward, {.act = *code, .gate = gate->in(), .up = up->in(), .h = torch.made(h).out()},
                    torch.stream(*gate));
  return h;
}

nb::object gated_gradients(nb::handle gate_, nb::handle up_, nb::handle dh_, std::string_view act, bool product) {
  const Torch& torch = Torch::get();
  const std::optional<Activation> code = activation_of(act);
  if (!code || !torch.is_eager()) return not_implemented();
  const std::optional<TensorRows> gate = torch.rows(gate_), up = torch.rows(up_), dh = torch.rows(dh_);
  if (!gate || !up || !dh || !up->is_like(*gate) || !dh->is_like(*gate)) return not_implemented();
  const nb::object dgate = torch.empty_like(gate_), dup = torch.empty_like(gate_);
  const nb::object h = product ? torch.empty_like(gate_) : nb::none();
  run<GatedBackward>(gated_backward,
                     {.act = *code,
                      .gate = gate->in(),
                      .up = up->in(),
                      .dh = dh->in(),
                      .dgate = torch.made(dgate).out(),
                      .dup = torch.made(dup).out(),
                      .h = product ? torch.made(h).out() : Rows{nullptr, gate->dtype, gate->rows, gate->cols, gate->cols}},
                     torch.stream(*gate));
  return product ? nb::make_tuple(dgate, dup, h) : nb::make_tuple(dgate, dup);
}

nb::object gated_backward_(nb::handle gate, nb::handle up, nb::handle dh, std::string_view act) {
  return gated_gradients(gate, up, dh, act, false);
}

nb::object gated_backward_product_(nb::handle gate, nb::handle up, nb::handle dh, std::string_view act) {
  return gated_gradients(gate, up, dh, act, true);
}

}  // namespace

void bind_eager(nb::module_& m) {
  nb::module_ eager = m.def_submodule(
      "eager",
      "Ops of unswag.torch.ops on PyTorch's tensors; each returns NotImplemented where the op itself is to be called.");
  eager.def(
      "is_eager", [] { return Torch::get().is_eager(); },
      "Whether no mode, transform, tracer or profiler would see a call of an op, and no graph is being recorded.");
  eager.def(
      "are_plain",
      [](const nb::args& values) {
        const Torch& torch = Torch::get();
        return torch.is_eager() && std::ranges::all_of(values, [&](nb::handle x) { return torch.is_plain(x); });
      },
      "Whether `is_eager`, and each value is no tensor or an ordinary one on the CPU or on CUDA.");
  eager.def(
      "takes",
      [](const nb::args& values) {
        const Torch& torch = Torch::get();
        return torch.is_reverse_mode() &&
               std::ranges::all_of(values, [&](nb::handle x) { return x.is_none() || torch.dtype_of(x).has_value(); });
      },
      "Whether a function of unswag.torch.functional needs no look at these tensors (or None): they are ordinary, of a dtype\n"
      "with kernels, on the CPU or on CUDA, and neither torch.func nor forward mode is on.");
  eager.def(
      "are_dense",
      [](const nb::args& tensors) {
        const Torch& torch = Torch::get();
        if (!torch.is_reverse_mode()) return false;
        std::optional<DType> dtype;
        return std::ranges::all_of(tensors, [&](nb::handle x) {
          const std::optional<TensorRows> rows = torch.rows(x);
          if (!rows || !rows->is_dense() || (dtype && rows->dtype != *dtype)) return false;
          dtype = rows->dtype;
          return true;
        });
      },
      "Whether `takes`, and the tensors are contiguous, of one dtype and of at least one dimension and one element.");
  eager.def("rms_norm_forward", &rms_norm_forward_, "x"_a, "weight"_a.none(), "eps"_a, "weight_offset"_a,
            "cast_before_weight"_a, "out_dtype"_a.none());
  eager.def("rms_norm_apply", &rms_norm_apply_, "x"_a, "rstd"_a, "weight"_a.none(), "weight_offset"_a, "cast_before_weight"_a,
            "out_dtype"_a.none());
  eager.def("rms_norm_backward", &rms_norm_backward_, "x"_a, "rstd"_a, "weight"_a.none(), "dy"_a, "weight_offset"_a,
            "cast_before_weight"_a, "need_dx"_a, "need_dw"_a);
  eager.def("layer_norm_forward", &layer_norm_forward_, "x"_a, "weight"_a.none(), "bias"_a.none(), "eps"_a,
            "out_dtype"_a.none());
  eager.def("layer_norm_apply", &layer_norm_apply_, "x"_a, "mean"_a, "rstd"_a, "weight"_a.none(), "bias"_a.none(),
            "out_dtype"_a.none());
  eager.def("layer_norm_backward", &layer_norm_backward_, "x"_a, "mean"_a, "rstd"_a, "weight"_a.none(), "dy"_a, "need_dx"_a,
            "need_dw"_a, "need_db"_a);
  eager.def("activation_forward", &activation_forward_, "x"_a, "act"_a);
  eager.def("activation_backward", &activation_backward_, "x"_a, "dy"_a, "act"_a);
  eager.def("gated_forward", &gated_forward_, "gate"_a, "up"_a, "act"_a);
  eager.def("gated_backward", &gated_backward_, "gate"_a, "up"_a, "dh"_a, "act"_a);
  eager.def("gated_backward_product", &gated_backward_product_, "gate"_a, "up"_a, "dh"_a, "act"_a);
}

}  // namespace unswag::python

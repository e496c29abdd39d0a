// The hot path of unswag.torch.stash: what a training step does about a thousand times.  `Door` makes the handles of parameters
// and of tensors held by reference; all else it hands to `Stash.door` (stash/door.py), which does the same as this file and
// more, and says why.  The types are plain CPython ones: an object of nanobind's costs as much as what is done with it.  Leases
// and handles are unknown to the garbage collector, which would run more often for them and cannot follow the graph that owns
// them anyway.
#include <nanobind/nanobind.h>
#include <structmember.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <new>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "common.hpp"
#include "torch.hpp"

namespace unswag::python {

namespace {

using Key = long long;

// Names that are looked up in objects of PyTorch's and of the stash's.
struct Names {
  PyObject* alias_version = PyUnicode_InternFromString("_version");
  PyObject* base = PyUnicode_InternFromString("_base");
  PyObject* storage = PyUnicode_InternFromString("untyped_storage");
  PyObject* address = PyUnicode_InternFromString("_cdata");
  PyObject* layout = PyUnicode_InternFromString("layout");
  PyObject* grad_fn = PyUnicode_InternFromString("grad_fn");
  PyObject* name = PyUnicode_InternFromString("name");
  PyObject* type_name = PyUnicode_InternFromString("__name__");
  PyObject* detach = PyUnicode_InternFromString("detach");
  PyObject* role = PyUnicode_InternFromString("role");
  PyObject* recorder = PyUnicode_InternFromString("recorder");
  PyObject* references = PyUnicode_InternFromString("references");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* device = PyUnicode_InternFromString("device");
  PyObject* open = PyUnicode_InternFromString("open");
  PyObject* overwritten = PyUnicode_InternFromString("_overwritten");
  PyObject* backward_class = PyUnicode_InternFromString("_backward_cls");
  PyObject* run = PyUnicode_InternFromString("_run");
  PyObject* checked = PyUnicode_InternFromString("_checked");
  PyObject* check = PyUnicode_InternFromString("check");
  PyObject* as_strided = PyUnicode_InternFromString("as_strided");
  PyObject* storage_offset = PyUnicode_InternFromString("storage_offset");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* is_cuda = PyUnicode_InternFromString("is_cuda");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* output_nr = PyUnicode_InternFromString("output_nr");
  PyObject* metadata = PyUnicode_InternFromString("metadata");
  PyObject* entry = PyUnicode_InternFromString("unswag");
  PyObject* weak_ref = PyUnicode_InternFromString("_weak_ref");
  PyObject* make = PyUnicode_InternFromString("__new__");
  PyObject* data = PyUnicode_InternFromString("data");
  PyObject* parameter_tier = PyUnicode_InternFromString("parameter");
  PyObject* shared_tier = PyUnicode_InternFromString("shared");
  PyObject* device_tier = PyUnicode_InternFromString("device");
};
const Names& names() {
  static const Names names;
  return names;
}

nb::object steal(PyObject* object) {
  if (object == nullptr) throw nb::python_error();
  return nb::steal(object);
}
nb::object attribute(PyObject* object, PyObject* name) { return steal(PyObject_GetAttr(object, name)); }
nb::object method(PyObject* object, PyObject* name) { return steal(PyObject_CallMethodObjArgs(object, name, nullptr)); }
long version_of(PyObject* tensor) {
  const nb::object version = attribute(tensor, names().alias_version);
  const long value = PyLong_AsLong(version.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) throw nb::python_error();
  return value;
}

// Runs `function` and turns what it throws into a Python error.
template <class Function>
PyObject* guarded(Function function) {
  try {
    return function();
  } catch (nb::python_error& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* borrowed(PyObject* object) {
  Py_INCREF(object);
  return object;
}

template <class T>
T* cast(PyObject* object) {
  return reinterpret_cast<T*>(object);
}

// Frees an object of a heap type.
void release(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

// ---- leases: one for each storage that is held by reference.  A lease holds the storage too (under a mode, the alias that a
// handle holds may have another one), so its address cannot be that of another storage while the lease is here.

struct Lease;
using Table = std::unordered_map<Key, Lease*>;

struct Lease {
  PyObject_HEAD PyObject* weak;
  PyObject* replaceable;
  PyObject* writers;
  PyObject* storage;  // none for a lease that was made without a table
  char checked;
  std::shared_ptr<Table> table;
  Key key;
};

struct Leases {
  PyObject_HEAD std::shared_ptr<Table> table;
};

PyTypeObject* lease_type = nullptr;
PyTypeObject* leases_type = nullptr;

Lease* new_lease(PyTypeObject* type, bool checked) {
  PyObject* self = PyType_GenericAlloc(type, 0);
  if (self == nullptr) throw nb::python_error();
  Lease* lease = cast<Lease>(self);
  new (&lease->table) std::shared_ptr<Table>;
  Py_INCREF(Py_None);
  lease->replaceable = Py_None;
  lease->writers = PyTuple_New(0);
  lease->checked = static_cast<char>(checked);
  return lease;
}

PyObject* lease_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* keywords[] = {"checked", nullptr};
  int checked = 1;
  if (PyArg_ParseTupleAndKeywords(args, kwargs, "|p", const_cast<char**>(keywords), &checked) == 0) return nullptr;
  return guarded([&] { return cast<PyObject>(reinterpret_cast<PyObject*>(new_lease(type, checked != 0))); });
}
void lease_clear(PyObject* self) {
  Py_CLEAR(cast<Lease>(self)->storage);
  Py_CLEAR(cast<Lease>(self)->replaceable);
  Py_CLEAR(cast<Lease>(self)->writers);
}
void lease_dealloc(PyObject* self) {
  Lease* lease = cast<Lease>(self);
  if (lease->weak != nullptr) PyObject_ClearWeakRefs(self);
  if (lease->table) {
    const auto found = lease->table->find(lease->key);
    if (found != lease->table->end() && found->second == lease) lease->table->erase(found);
  }
  lease->table.~shared_ptr();
  lease_clear(self);
  release(self);
}
// Whether no program that PyTorch accepts changes the content before the backward; the Function of `node` is trusted.
bool protects(const Lease& lease, PyObject* node) {
  if (lease.checked == 0) return false;
  for (Py_ssize_t i = 0, n = PyTuple_Size(lease.writers); i < n; ++i) {
    const nb::object backward = nb::steal(PyObject_GetAttr(PyTuple_GetItem(lease.writers, i), names().backward_class));
    if (!backward.is_valid()) PyErr_Clear();
    if (backward.ptr() != reinterpret_cast<PyObject*>(Py_TYPE(node))) return false;
  }
  return true;
}
PyObject* lease_protects(PyObject* self, PyObject* node) {
  return guarded([&] { return borrowed(protects(*cast<Lease>(self), node) ? Py_True : Py_False); });
}
PyMemberDef lease_members[] = {
    {"replaceable", T_OBJECT, offsetof(Lease, replaceable), 0, nullptr},
    {"writers", T_OBJECT, offsetof(Lease, writers), 0, nullptr},
    {"checked", T_BOOL, offsetof(Lease, checked), 0, nullptr},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Lease, weak), READONLY, nullptr},
    {},
};
PyMethodDef lease_methods[] = {{"protects", lease_protects, METH_O, nullptr}, {}};

PyObject* leases_new(PyTypeObject* type, PyObject*, PyObject*) {
  PyObject* self = PyType_GenericAlloc(type, 0);
  if (self != nullptr) new (&cast<Leases>(self)->table) std::shared_ptr<Table>(std::make_shared<Table>());
  return self;
}
void leases_dealloc(PyObject* self) {
  cast<Leases>(self)->table.~shared_ptr();
  release(self);
}
Lease* find(PyObject* leases, Key key) {
  const Table& table = *cast<Leases>(leases)->table;
  const auto found = table.find(key);
  return found == table.end() ? nullptr : found->second;
}
nb::object add(PyObject* leases, nb::object storage, Key key, bool checked) {
  Lease* lease = new_lease(lease_type, checked);
  lease->storage = storage.release().ptr();
  lease->table = cast<Leases>(leases)->table;
  lease->key = key;
  (*lease->table)[key] = lease;
  return nb::steal(reinterpret_cast<PyObject*>(lease));
}
PyObject* leases_get(PyObject* self, PyObject* key) {
  const Key address = PyLong_AsLongLong(key);
  if (address == -1 && PyErr_Occurred() != nullptr) return nullptr;
  PyObject* lease = reinterpret_cast<PyObject*>(find(self, address));
  if (lease == nullptr) lease = Py_None;
  Py_INCREF(lease);
  return lease;
}
PyObject* leases_add(PyObject* self, PyObject* args) {
  PyObject* storage = nullptr;
  int checked = 0;
  if (PyArg_ParseTuple(args, "Op", &storage, &checked) == 0) return nullptr;
  return guarded([&] {
    const Key key = PyLong_AsLongLong(attribute(storage, names().address).ptr());
    return add(self, nb::borrow(storage), key, checked != 0).release().ptr();
  });
}
PyObject* leases_clear(PyObject* self, PyObject*) {
  cast<Leases>(self)->table = std::make_shared<Table>();
  Py_RETURN_NONE;
}
Py_ssize_t leases_len(PyObject* self) { return static_cast<Py_ssize_t>(cast<Leases>(self)->table->size()); }
PyMethodDef leases_methods[] = {
    {"get", leases_get, METH_O, nullptr},
    {"add", leases_add, METH_VARARGS, nullptr},
    {"clear", leases_clear, METH_NOARGS, nullptr},
    {},
};

// ---- what a handle by reference holds: the base of stash.handles.ByReference

struct Reference {
  PyObject_HEAD PyObject* weak;
  PyObject* alias;
  PyObject* tier;
  PyObject* role;
  PyObject* model;
  PyObject* lease;
  PyObject* replacement;
  long version;
};

PyTypeObject* reference_type = nullptr;

PyObject* new_reference(PyTypeObject* type, nb::object alias, long version, PyObject* tier, PyObject* role, PyObject* model,
                        nb::object lease) {
  PyObject* self = PyType_GenericAlloc(type, 0);
  if (self == nullptr) throw nb::python_error();
  Reference* r = cast<Reference>(self);
  r->alias = alias.release().ptr();
  r->version = version;
  r->tier = borrowed(tier);
  r->role = borrowed(role);
  r->model = borrowed(model);
  r->lease = lease.release().ptr();
  r->replacement = borrowed(Py_None);
  return self;
}

// Never t itself: an op that saves its own output would own itself.
nb::object alias_of(PyObject* t) { return method(t, names().detach); }

PyObject* reference_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* keywords[] = {"t", "tier", "role", "model", "lease", nullptr};
  PyObject *t = nullptr, *tier = nullptr, *role = nullptr, *model = nullptr, *lease = Py_None;
  if (PyArg_ParseTupleAndKeywords(args, kwargs, "OUOO|O", const_cast<char**>(keywords), &t, &tier, &role, &model, &lease) == 0)
    return nullptr;
  return guarded([&] { return new_reference(type, alias_of(t), version_of(t), tier, role, model, nb::borrow(lease)); });
}
void reference_clear(PyObject* self) {
  Reference* r = cast<Reference>(self);
  for (PyObject** held : {&r->alias, &r->tier, &r->role, &r->model, &r->lease, &r->replacement}) Py_CLEAR(*held);
}
void reference_dealloc(PyObject* self) {
  if (cast<Reference>(self)->weak != nullptr) PyObject_ClearWeakRefs(self);
  reference_clear(self);
  release(self);
}
PyObject* reference_open(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    Reference* r = cast<Reference>(self);
    if (r->replacement != Py_None) return method(r->replacement, names().open).release().ptr();
    if (version_of(r->alias) != r->version) return method(self, names().overwritten).release().ptr();
    return borrowed(r->alias);
  });
}
PyMemberDef reference_members[] = {
    {"alias", T_OBJECT, offsetof(Reference, alias), 0, nullptr},
    {"tier", T_OBJECT, offsetof(Reference, tier), 0, nullptr},
    {"role", T_OBJECT, offsetof(Reference, role), 0, nullptr},
    {"model", T_OBJECT, offsetof(Reference, model), 0, nullptr},
    {"lease", T_OBJECT, offsetof(Reference, lease), 0, nullptr},
    {"replacement", T_OBJECT, offsetof(Reference, replacement), 0, nullptr},
    {"version", T_LONG, offsetof(Reference, version), 0, nullptr},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Reference, weak), READONLY, nullptr},
    {},
};
PyMethodDef reference_methods[] = {{"open", reference_open, METH_NOARGS, nullptr}, {}};

// ---- recipes.  The result of a run stays until every handle alive has read it, until two younger results of the stash push it
// out, or until a reader writes into it.  `epoch` counts the runs that served new readers; a handle has read the result if its
// `seen` is the epoch, and `waiting` is the number of those that have not.

struct Recipe;
struct Results {
  PyObject_HEAD Recipe* older;
  Recipe* younger;
};
struct Recipe {
  PyObject_HEAD PyObject* weak;
  PyObject* function;
  PyObject* inputs;
  PyObject* constants;
  PyObject* layout;
  PyObject* results;
  PyObject* result;  // None, or the tensor that a handle waits for
  long version;      // that it had
  long long epoch;
  long long alive;
  long long waiting;
};
struct Recomputed {
  PyObject_HEAD PyObject* weak;
  PyObject* recipe;
  PyObject* size;
  PyObject* stride;
  PyObject* guard;
  long long offset;
  long long seen;
  char whole;  // size and stride are those of the recipe's tensor
};

PyTypeObject* results_type = nullptr;
PyTypeObject* recipe_type = nullptr;
PyTypeObject* recomputed_type = nullptr;

void set_result(Recipe* recipe, PyObject* result) {
  PyObject* before = std::exchange(recipe->result, result);
  Py_XDECREF(before);
}
void drop_result(Recipe* recipe) { set_result(recipe, borrowed(Py_None)); }

// `recipe` holds a result now; the older of two others lets go of its own.
void push(Results* results, Recipe* recipe) {
  for (Recipe** held : {&results->older, &results->younger})
    if (*held != nullptr && (*held == recipe || (*held)->result == Py_None)) *held = nullptr;
  if (results->younger == nullptr) std::swap(results->older, results->younger);
  Recipe* out = results->older;
  results->older = results->younger;
  results->younger = recipe;
  if (out != nullptr) drop_result(out);
}
void forget(Results* results, Recipe* recipe) {
  for (Recipe** held : {&results->older, &results->younger})
    if (*held == recipe) *held = nullptr;
}

PyObject* recipe_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *function = nullptr, *inputs = nullptr, *constants = nullptr, *layout = nullptr, *results = nullptr;
  if (PyArg_ParseTuple(args, "OO!OO!O!", &function, &PyTuple_Type, &inputs, &constants, &PyTuple_Type, &layout, results_type,
                       &results) == 0)
    return nullptr;
  PyObject* self = PyType_GenericAlloc(type, 0);
  if (self == nullptr) return nullptr;
  Recipe* recipe = cast<Recipe>(self);
  recipe->function = borrowed(function);
  recipe->inputs = borrowed(inputs);
  recipe->constants = borrowed(constants);
  recipe->layout = borrowed(layout);
  recipe->results = borrowed(results);
  recipe->result = borrowed(Py_None);
  return self;
}
void recipe_dealloc(PyObject* self) {
  Recipe* recipe = cast<Recipe>(self);
  if (recipe->weak != nullptr) PyObject_ClearWeakRefs(self);
  forget(cast<Results>(recipe->results), recipe);
  for (PyObject** held :
       {&recipe->result, &recipe->function, &recipe->inputs, &recipe->constants, &recipe->layout, &recipe->results})
    Py_CLEAR(*held);
  release(self);
}
PyMemberDef recipe_members[] = {
    {"function", T_OBJECT, offsetof(Recipe, function), READONLY, nullptr},
    {"inputs", T_OBJECT, offsetof(Recipe, inputs), READONLY, nullptr},
    {"constants", T_OBJECT, offsetof(Recipe, constants), READONLY, nullptr},
    {"layout", T_OBJECT, offsetof(Recipe, layout), READONLY, nullptr},
    {"results", T_OBJECT, offsetof(Recipe, results), READONLY, nullptr},
    {"result", T_OBJECT, offsetof(Recipe, result), READONLY, nullptr},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Recipe, weak), READONLY, nullptr},
    {},
};

bool equal(PyObject* a, PyObject* b) {
  const int same = PyObject_RichCompareBool(a, b, Py_EQ);
  if (same < 0) throw nb::python_error();
  return same == 1;
}
nb::object opened(PyObject* handle);

// The Layouts of the last few geometries of contiguous tensors on the CPU, which a model has few of: to make one takes longer
// than all else that is asked of a tensor here.
class Layouts {
 public:
  // That of t; nothing for a tensor of another kind, and for a new geometry without `make`.
  template <class Make>
  nb::object of(PyObject* t, Make make) {
    const std::optional<dlpack::Tensor> found = Torch::get().on_cpu(t);
    if (!found || found->ndim > kDims) return {};
    Entry entry{};
    entry.ndim = found->ndim;
    entry.type = {found->type_code, found->type_bits, found->lanes};
    std::int64_t step = 1;
    for (int i = found->ndim - 1; i >= 0; --i) {
      if (found->shape[i] != 1 && found->strides[i] != step) return {};
      step *= std::max<std::int64_t>(found->shape[i], 1);
      entry.shape[static_cast<std::size_t>(i)] = found->shape[i];
      entry.strides[static_cast<std::size_t>(i)] = found->strides[i];
    }
    for (const Entry& known : entries_)
      if (known.layout != nullptr && known.is(entry)) return nb::borrow(known.layout);
    nb::object made = make();
    if (made.is_valid()) {
      entry.layout = borrowed(made.ptr());
      std::swap(entries_[next_], entry);
      next_ = (next_ + 1) % entries_.size();
      Py_XDECREF(entry.layout);
    }
    return made;
  }
  nb::object known(PyObject* t) {
    return of(t, [] { return nb::object(); });
  }

 private:
  static constexpr int kDims = 5;
  struct Entry {
    int ndim;
    std::array<int, 3> type;
    std::array<std::int64_t, kDims> shape, strides;
    PyObject* layout;
    bool is(const Entry& other) const {
      return ndim == other.ndim && type == other.type && shape == other.shape && strides == other.strides;
    }
  };
  std::array<Entry, 16> entries_{};
  std::size_t next_ = 0;
};
Layouts& layouts() {
  static Layouts layouts;
  return layouts;
}

// function(*inputs, **constants), as Recipe._run, which does what is left: modes other than that of a backward, results that
// are not what they should be.
nb::object run(Recipe* recipe) {
  PyObject* self = reinterpret_cast<PyObject*>(recipe);
  if (Torch::get().is_grad_enabled() || Torch::get().is_inference()) return method(self, names().run);
  const Py_ssize_t n = PyTuple_Size(recipe->inputs);
  const nb::object inputs = steal(PyTuple_New(n));
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* handle = PyTuple_GetItem(recipe->inputs, i);
    PyTuple_SetItem(inputs.ptr(), i, (handle == Py_None ? nb::none() : opened(handle)).release().ptr());
  }
  nb::object result = steal(PyObject_Call(recipe->function, inputs.ptr(), recipe->constants));
  if (layouts().known(result.ptr()).ptr() == recipe->layout) return result;
  const auto is = [&](const nb::object& value, Py_ssize_t i) { return equal(value.ptr(), PyTuple_GetItem(recipe->layout, i)); };
  if (is(attribute(result.ptr(), names().shape), 0) && is(method(result.ptr(), names().stride), 1) &&
      is(attribute(result.ptr(), names().dtype), 2) && is(attribute(result.ptr(), names().device), 3))
    return result;
  return steal(PyObject_CallMethodObjArgs(self, names().checked, result.ptr(), nullptr));
}

// The tensor, for `reader`.  Python code runs here, so that another thread may come in between.
nb::object read(Recipe* recipe, Recomputed* reader) {
  nb::object before = nb::borrow(recipe->result);
  const bool had = !before.is_none();
  const auto has_read = [&] {
    if (reader->seen != recipe->epoch) {
      reader->seen = recipe->epoch;
      --recipe->waiting;
    }
  };
  if (had && version_of(before.ptr()) == recipe->version) {
    if (recipe->result != Py_None) {
      has_read();
      if (recipe->waiting <= 0) drop_result(recipe);
    }
    return before;
  }
  nb::object result = run(recipe);
  if (had && recipe->result != Py_None) {
    has_read();
  } else {
    reader->seen = ++recipe->epoch;
    recipe->waiting = recipe->alive - 1;
  }
  if (recipe->waiting > 0) {
    recipe->version = version_of(result.ptr());
    set_result(recipe, borrowed(result.ptr()));
    push(cast<Results>(recipe->results), recipe);
  } else {
    drop_result(recipe);
  }
  return result;
}

nb::object new_recomputed(PyTypeObject* type, PyObject* recipe_, PyObject* size, PyObject* stride, long long offset,
                          bool whole) {
  nb::object self = steal(PyType_GenericAlloc(type, 0));
  Recomputed* handle = cast<Recomputed>(self.ptr());
  Recipe* recipe = cast<Recipe>(recipe_);
  handle->recipe = borrowed(recipe_);
  handle->size = borrowed(size);
  handle->stride = borrowed(stride);
  handle->guard = borrowed(Py_None);
  handle->offset = offset;
  handle->whole = static_cast<char>(whole);
  handle->seen = -1;
  ++recipe->alive;
  if (recipe->result != Py_None) ++recipe->waiting;
  return self;
}
PyObject* recomputed_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *recipe = nullptr, *size = nullptr, *stride = nullptr;
  long long offset = 0;
  if (PyArg_ParseTuple(args, "O!OOL", recipe_type, &recipe, &size, &stride, &offset) == 0) return nullptr;
  return guarded([&] {
    PyObject* layout = cast<Recipe>(recipe)->layout;
    const bool whole = offset == 0 && equal(size, PyTuple_GetItem(layout, 0)) && equal(stride, PyTuple_GetItem(layout, 1));
    return new_recomputed(type, recipe, size, stride, offset, whole).release().ptr();
  });
}
void recomputed_dealloc(PyObject* self) {
  Recomputed* handle = cast<Recomputed>(self);
  if (handle->weak != nullptr) PyObject_ClearWeakRefs(self);
  if (handle->recipe != nullptr) {
    Recipe* recipe = cast<Recipe>(handle->recipe);
    --recipe->alive;
    if (recipe->result != Py_None) {
      if (handle->seen != recipe->epoch) --recipe->waiting;
      if (recipe->waiting <= 0) drop_result(recipe);
    }
  }
  for (PyObject** held : {&handle->guard, &handle->size, &handle->stride, &handle->recipe}) Py_CLEAR(*held);
  release(self);
}
PyObject* recomputed_open(PyObject* self, PyObject*) {
  return guarded([&] {
    Recomputed* handle = cast<Recomputed>(self);
    if (handle->guard != Py_None) method(handle->guard, names().check);
    nb::object result = read(cast<Recipe>(handle->recipe), handle);
    if (handle->whole == 0) {
      const nb::object start = method(result.ptr(), names().storage_offset);
      const nb::object offset = steal(PyLong_FromLongLong(PyLong_AsLongLong(start.ptr()) + handle->offset));
      result = steal(
          PyObject_CallMethodObjArgs(result.ptr(), names().as_strided, handle->size, handle->stride, offset.ptr(), nullptr));
    }
    return result.release().ptr();
  });
}
PyMemberDef recomputed_members[] = {
    {"recipe", T_OBJECT, offsetof(Recomputed, recipe), READONLY, nullptr},
    {"size", T_OBJECT, offsetof(Recomputed, size), READONLY, nullptr},
    {"stride", T_OBJECT, offsetof(Recomputed, stride), READONLY, nullptr},
    {"guard", T_OBJECT, offsetof(Recomputed, guard), 0, nullptr},
    {"offset", T_LONGLONG, offsetof(Recomputed, offset), READONLY, nullptr},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Recomputed, weak), READONLY, nullptr},
    {},
};
PyMethodDef recomputed_methods[] = {{"open", recomputed_open, METH_NOARGS, nullptr}, {}};

PyObject* results_new(PyTypeObject* type, PyObject*, PyObject*) { return PyType_GenericAlloc(type, 0); }
void results_dealloc(PyObject* self) { release(self); }

// A weak reference to a storage, as torch.multiprocessing.reductions.StorageWeakRef.
struct WeakStorage {
  PyObject_HEAD PyObject* cdata;
};
PyTypeObject* weak_storage_type = nullptr;

PyObject* of_storage(const char* name) {
  return nb::object(nb::module_::import_("torch").attr("UntypedStorage").attr(name)).release().ptr();
}
PyObject* new_weak_storage(PyTypeObject* type, PyObject* storage) {
  nb::object address = method(storage, names().weak_ref);
  PyObject* self = PyType_GenericAlloc(type, 0);
  if (self == nullptr) throw nb::python_error();
  cast<WeakStorage>(self)->cdata = address.release().ptr();
  return self;
}
PyObject* weak_storage_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject* storage = nullptr;
  if (PyArg_ParseTuple(args, "O", &storage) == 0) return nullptr;
  return guarded([&] { return new_weak_storage(type, storage); });
}
void weak_storage_dealloc(PyObject* self) {
  static PyObject* const free_weak_ref = of_storage("_free_weak_ref");
  if (PyObject* address = cast<WeakStorage>(self)->cdata) {
    PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
    PyErr_Fetch(&type, &value, &trace);
    PyObject* done = PyObject_CallFunctionObjArgs(free_weak_ref, address, nullptr);
    if (done == nullptr) PyErr_WriteUnraisable(self);
    Py_XDECREF(done);
    Py_DECREF(address);
    PyErr_Restore(type, value, trace);
  }
  release(self);
}
bool is_dead(PyObject* weak) {
  static PyObject* const expired = of_storage("_expired");
  return steal(PyObject_CallFunctionObjArgs(expired, cast<WeakStorage>(weak)->cdata, nullptr)).is(nb::bool_(true));
}
PyObject* weak_storage_expired(PyObject* self, PyObject*) {
  return guarded([&] { return borrowed(is_dead(self) ? Py_True : Py_False); });
}
PyMemberDef weak_storage_members[] = {{"cdata", T_OBJECT, offsetof(WeakStorage, cdata), READONLY, nullptr}, {}};
PyMethodDef weak_storage_methods[] = {{"expired", weak_storage_expired, METH_NOARGS, nullptr}, {}};

// What the registry knows of an output: the base of stash.outputs.RememberedOutput, which says what the fields are.
struct Output {
  PyObject_HEAD PyObject* weak;
  PyObject* storage;
  PyObject* counter;
  PyObject* layout;
  PyObject* stream;
  PyObject* recipe;
  PyObject* casts;
  long long offset;
  long version;
  int number;
  char chained;
};
PyTypeObject* output_type = nullptr;

PyObject* output_new(PyTypeObject* type, PyObject*, PyObject*) { return PyType_GenericAlloc(type, 0); }
void output_dealloc(PyObject* self) {
  Output* output = cast<Output>(self);
  if (output->weak != nullptr) PyObject_ClearWeakRefs(self);
  for (PyObject** held :
       {&output->storage, &output->counter, &output->layout, &output->stream, &output->recipe, &output->casts})
    Py_CLEAR(*held);
  release(self);
}
PyMemberDef output_members[] = {
    {"storage", T_OBJECT, offsetof(Output, storage), 0, nullptr},
    {"counter", T_OBJECT, offsetof(Output, counter), 0, nullptr},
    {"layout", T_OBJECT, offsetof(Output, layout), 0, nullptr},
    {"stream", T_OBJECT, offsetof(Output, stream), 0, nullptr},
    {"recipe", T_OBJECT, offsetof(Output, recipe), 0, nullptr},
    {"casts", T_OBJECT, offsetof(Output, casts), 0, nullptr},
    {"offset", T_LONGLONG, offsetof(Output, offset), 0, nullptr},
    {"version", T_LONG, offsetof(Output, version), 0, nullptr},
    {"number", T_INT, offsetof(Output, number), 0, nullptr},
    {"chained", T_BOOL, offsetof(Output, chained), 0, nullptr},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Output, weak), READONLY, nullptr},
    {},
};

// ---- the door

struct Door {
  PyObject_HEAD
      // Held: the stash's own door, its registries, and what it marks handles with.
      PyObject* slow;
  PyObject* leases;
  PyObject* results;
  PyObject* outputs;
  PyObject* marks;
  PyObject* pending;
  PyObject* state;
  PyObject* model;
  PyObject* by_reference;  // the types ByReference, Recomputed and RememberedOutput
  PyObject* recomputed;
  PyObject* remembered;
  PyObject* recipe;           // the type Recipe
  PyObject* layout;           // the type Layout
  PyObject* version_counter;  // stash.layout.version_counter
  PyObject* unusual;          // globals of the code whose saved tensors need a look: PyTorch's checkpoint and autograd.Function
  PyObject* collect;          // None, or what is told of each tensor in the recompute of a checkpoint
  PyObject* placeholder;      // what it is told: a type
};
constexpr Py_ssize_t kHeld = 17;

PyObject** held(PyObject* self) { return &cast<Door>(self)->slow; }

PyTypeObject* door_type = nullptr;

PyObject* door_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject* values[kHeld] = {};
  PyTypeObject* const types[kHeld] = {nullptr,      leases_type, results_type,  &PyDict_Type, &PyDict_Type, &PyDict_Type,
                                      nullptr,      nullptr,     &PyType_Type,  &PyType_Type, &PyType_Type, &PyType_Type,
                                      &PyType_Type, nullptr,     &PyTuple_Type, nullptr,      nullptr};
  if (PyTuple_Size(args) != kHeld) {
    PyErr_SetString(PyExc_TypeError, "Door: wrong number of arguments");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < kHeld; ++i) {
    values[i] = PyTuple_GetItem(args, i);
    if (types[i] != nullptr && PyObject_IsInstance(values[i], reinterpret_cast<PyObject*>(types[i])) != 1) {
      PyErr_Format(PyExc_TypeError, "Door: argument %zd is %R", i, values[i]);
      return nullptr;
    }
  }
  PyTypeObject* const bases[] = {reference_type, recomputed_type, output_type, recipe_type};
  for (Py_ssize_t i = 0; i < 4; ++i)
    if (PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(values[8 + i]), bases[i]) == 0) {
      PyErr_SetString(PyExc_TypeError, "Door: a type is not derived from the core's");
      return nullptr;
    }
  PyObject* self = PyType_GenericAlloc(type, 0);
  if (self == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i < kHeld; ++i) held(self)[i] = borrowed(values[i]);
  return self;
}
int door_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  for (Py_ssize_t i = 0; i < kHeld; ++i) Py_VISIT(held(self)[i]);
  return 0;
}
int door_clear(PyObject* self) {
  for (Py_ssize_t i = 0; i < kHeld; ++i) Py_CLEAR(held(self)[i]);
  return 0;
}
void door_dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  door_clear(self);
  release(self);
}

// A tensor's storage and its key; none where it has none of its own.
nb::object storage_of(PyObject* t, Key* key) {
  static PyObject* const strided = nb::object(nb::module_::import_("torch").attr("strided")).release().ptr();
  if (attribute(t, names().layout).ptr() != strided) return {};
  nb::object storage = method(t, names().storage);
  *key = PyLong_AsLongLong(attribute(storage.ptr(), names().address).ptr());
  return storage;
}

// Whether t, or what it is a view of, was made by a cast: it may be autocast's copy of a parameter, or of an output.
bool is_cast(PyObject* t, PyObject* base) {
  static PyTypeObject* cast_node = nullptr;         // the one type of node with that name, once it was seen
  static std::unordered_set<PyTypeObject*> others;  // types of nodes with another name, which are never freed
  static PyObject* const function = nb::object(nb::module_::import_("torch").attr("_C").attr("_FunctionBase")).release().ptr();
  const nb::object node = attribute(base == Py_None ? t : base, names().grad_fn);
  if (node.is_none()) return false;
  PyTypeObject* type = Py_TYPE(node.ptr());
  if (type == cast_node) return true;
  // An autograd.Function's name ends with "Backward".
  if (others.contains(type) || PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(function)) != 0) return false;
  const nb::object name = method(node.ptr(), names().name);
  const bool is = PyUnicode_CompareWithASCIIString(name.ptr(), "ToCopyBackward0") == 0;
  if ((PyType_GetFlags(type) & Py_TPFLAGS_HEAPTYPE) == 0 &&
      equal(name.ptr(), attribute(reinterpret_cast<PyObject*>(type), names().type_name).ptr())) {
    if (is)
      cast_node = type;
    else
      others.insert(type);
  }
  return is;
}

bool is_set(const Door& door, PyObject* name) { return !attribute(door.state, name).is_none(); }

nb::object make(const Door& door, PyObject* t, PyObject* tier, nb::object lease) {
  const nb::object role = attribute(door.state, names().role);
  return nb::steal(new_reference(reinterpret_cast<PyTypeObject*>(door.by_reference), alias_of(t), version_of(t), tier,
                                 role.ptr(), door.model, std::move(lease)));
}

// A handle on t if it is a parameter, a view of one, or held already and `lease_fits`; nothing otherwise.  `key` and `base` are
// what was found on the way, and `plain` says whether t is a tensor that may be held by reference here.
struct Found {
  nb::object handle;
  nb::object base;
  nb::object storage;
  Key key = 0;
  bool plain = false;
};
template <class Fits>
Found find_held(const Door& door, PyObject* t, Fits lease_fits) {
  const Torch& torch = Torch::get();
  Found found;
  const bool parameter = torch.is_parameter(t);
  if (!parameter && !torch.is_tensor(t)) return found;
  if (is_set(door, names().recorder) || is_set(door, names().references)) return found;
  if (!parameter) found.base = attribute(t, names().base);
  if (parameter || torch.is_parameter(found.base)) {
    found.handle = make(door, t, names().parameter_tier, nb::none());
    return found;
  }
  if (!found.base.is_none() && !torch.is_tensor(found.base)) return found;
  found.storage = storage_of(t, &found.key);
  if (!found.storage.is_valid()) return found;
  found.plain = true;
  if (Lease* lease = find(door.leases, found.key)) {
    found.plain = false;
    if (lease->replaceable == Py_None && lease_fits(*lease))
      found.handle = make(door, t, names().shared_tier, nb::borrow(reinterpret_cast<PyObject*>(lease)));
  }
  return found;
}

long long product(PyObject* sizes) {
  long long n = 1;
  for (Py_ssize_t i = 0, dims = PyTuple_Size(sizes); i < dims; ++i) n *= PyLong_AsLongLong(PyTuple_GetItem(sizes, i));
  return n;
}

// A handle on t, if it lies in that output, unchanged, on the CPU; nothing where the stash has to look.
nb::object recomputed(const Door& door, PyObject* t, PyObject* output_) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(output_)) != door.remembered) return {};
  const Output& output = *cast<Output>(output_);
  const bool known = output.stream == Py_None && output.recipe != nullptr && output.recipe != Py_None &&
                     !is_dead(output.storage) && version_of(t) == output.version &&
                     version_of(output.counter) == output.version;
  if (!known) return {};
  if (layouts().known(t).ptr() == output.layout && PyLong_AsLongLong(method(t, names().storage_offset).ptr()) == output.offset)
    return new_recomputed(reinterpret_cast<PyTypeObject*>(door.recomputed), output.recipe, PyTuple_GetItem(output.layout, 0),
                          PyTuple_GetItem(output.layout, 1), 0, true);
  // Contiguous inside the output, which is dense.
  const bool inside = attribute(t, names().dtype).ptr() == PyTuple_GetItem(output.layout, 2) &&
                      method(t, names().is_contiguous).is(nb::bool_(true)) && method(t, names().is_neg).is(nb::bool_(false));
  if (!inside) return {};
  const long long offset = PyLong_AsLongLong(method(t, names().storage_offset).ptr()) - output.offset;
  const nb::object shape = attribute(t, names().shape), stride = method(t, names().stride);
  PyObject* size = PyTuple_GetItem(output.layout, 0);
  const long long elements = product(shape.ptr());
  if (elements == 0 || offset < 0 || offset + elements > product(size)) return {};
  const bool whole = offset == 0 && equal(shape.ptr(), size) && equal(stride.ptr(), PyTuple_GetItem(output.layout, 1));
  return new_recomputed(reinterpret_cast<PyTypeObject*>(door.recomputed), output.recipe, shape.ptr(), stride.ptr(), offset,
                        whole);
}

// What the pack hook returns for t; nothing where Stash.door is to say.
nb::object fast(const Door& door, PyObject* t) {
  PyObject* globals = PyEval_GetGlobals();
  for (Py_ssize_t i = 0, n = PyTuple_Size(door.unusual); i < n; ++i)
    if (PyTuple_GetItem(door.unusual, i) == globals) {
      if (!Torch::get().is_parameter(t)) return {};
      break;
    }
  Found found = find_held(door, t, [](const Lease& lease) { return lease.checked != 0; });
  if (found.handle.is_valid() || !found.plain) return std::move(found.handle);
  if (PyDict_Size(door.outputs) != 0) {
    const nb::object key = steal(PyLong_FromLongLong(found.key));
    PyObject* output = PyDict_GetItemWithError(door.outputs, key.ptr());
    if (output == nullptr && PyErr_Occurred() != nullptr) throw nb::python_error();
    if (output != nullptr) return recomputed(door, t, output);
  }
  if (PyDict_Size(door.marks) != 0 || PyDict_Size(door.pending) != 0 || is_cast(t, found.base.ptr())) return {};
  return make(door, t, names().device_tier, add(door.leases, std::move(found.storage), found.key, true));
}

PyObject* door_call(PyObject* self, PyObject* args, PyObject*) {
  PyObject* t = nullptr;
  if (PyArg_ParseTuple(args, "O", &t) == 0) return nullptr;
  return guarded([&]() -> PyObject* {
    const Door& door = *cast<Door>(self);
    nb::object handle = fast(door, t);
    if (!handle.is_valid()) handle = steal(PyObject_CallFunctionObjArgs(door.slow, t, nullptr));
    if (door.collect != Py_None) {
      const nb::object told =
          steal(PyObject_CallFunctionObjArgs(door.placeholder, handle.ptr(), attribute(t, names().shape).ptr(),
                                             attribute(t, names().dtype).ptr(), attribute(t, names().device).ptr(), nullptr));
      steal(PyObject_CallFunctionObjArgs(door.collect, told.ptr(), nullptr));
    }
    return handle.release().ptr();
  });
}

// Takes the outputs whose storage is gone out of the registry.
void prune(PyObject* outputs) {
  PyObject *key = nullptr, *output = nullptr;
  std::vector<nb::object> dead;
  for (Py_ssize_t at = 0; PyDict_Next(outputs, &at, &key, &output) != 0;)
    if (PyObject_TypeCheck(output, output_type) && is_dead(cast<Output>(output)->storage)) dead.push_back(nb::borrow(key));
  for (const nb::object& gone : dead)
    if (PyDict_DelItem(outputs, gone.ptr()) != 0) PyErr_Clear();  // its death may have been another's
}
// As stash.layout.version_counter, for a tensor on the CPU.
nb::object version_counter(const Door& door, PyObject* t, PyObject* dtype) {
  static std::unordered_map<PyObject*, PyObject*> nothing;  // an empty tensor of each dtype
  PyObject*& empty = nothing[dtype];
  if (empty == nullptr) {
    if (Torch::get().is_inference()) return steal(PyObject_CallFunctionObjArgs(door.version_counter, t, nullptr));
    empty = Torch::get().empty_cpu(dtype).release().ptr();
  }
  nb::object counter = method(t, names().detach);
  if (PyObject_SetAttr(counter.ptr(), names().data, empty) != 0) throw nb::python_error();
  return counter;
}

// Does the work of Stash.register for an output of the common kind: contiguous, on the CPU, all of whose inputs are None,
// parameters or held by ops that protect them.  False, and nothing done, for any other.
bool remember(const Door& door, PyObject* output, PyObject* function, PyObject* inputs, PyObject* constants) {
  Key key = 0;
  if (PyDict_Size(door.marks) != 0 || PyDict_Size(door.pending) != 0) return false;
  prune(door.outputs);
  const nb::object layout = layouts().of(output, [&] {
    const nb::object fields =
        steal(PyTuple_Pack(4, attribute(output, names().shape).ptr(), method(output, names().stride).ptr(),
                           attribute(output, names().dtype).ptr(), attribute(output, names().device).ptr()));
    return steal(PyObject_CallMethodObjArgs(reinterpret_cast<PyObject*>(&PyTuple_Type), names().make, door.layout, fields.ptr(),
                                            nullptr));
  });
  if (!layout.is_valid()) return false;
  const nb::object storage = storage_of(output, &key);
  if (!storage.is_valid()) return false;
  const nb::object node = attribute(output, names().grad_fn);
  const Py_ssize_t n = PyTuple_Size(inputs);
  const nb::object handles = steal(PyTuple_New(n));
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* x = PyTuple_GetItem(inputs, i);
    nb::object handle = nb::none();
    if (x != Py_None) {
      handle = find_held(door, x, [&](Lease& lease) { return protects(lease, node.ptr()); }).handle;
      if (!handle.is_valid()) return false;
    }
    PyTuple_SetItem(handles.ptr(), i, handle.release().ptr());
  }
  nb::object recipe =
      steal(PyObject_CallFunctionObjArgs(door.recipe, function, handles.ptr(), constants, layout.ptr(), door.results, nullptr));
  const nb::object entry = steal(PyType_GenericAlloc(reinterpret_cast<PyTypeObject*>(door.remembered), 0));
  Output* remembered = cast<Output>(entry.ptr());
  remembered->storage = new_weak_storage(weak_storage_type, storage.ptr());
  remembered->counter = version_counter(door, output, PyTuple_GetItem(layout.ptr(), 2)).release().ptr();
  remembered->layout = borrowed(layout.ptr());
  remembered->stream = borrowed(Py_None);
  remembered->recipe = recipe.release().ptr();
  remembered->casts = steal(PyDict_New()).release().ptr();
  remembered->offset = PyLong_AsLongLong(method(output, names().storage_offset).ptr());
  remembered->version = version_of(output);
  remembered->number = static_cast<int>(PyLong_AsLong(attribute(output, names().output_nr).ptr()));
  const nb::object address = steal(PyLong_FromLongLong(key));
  if (PyDict_SetItem(door.outputs, address.ptr(), entry.ptr()) != 0) throw nb::python_error();
  if (!node.is_none()) {
    const nb::object weak = steal(PyWeakref_NewRef(entry.ptr(), nullptr));
    if (PyObject_SetItem(attribute(node.ptr(), names().metadata).ptr(), names().entry, weak.ptr()) != 0)
      throw nb::python_error();
  }
  return true;
}
PyObject* door_remember(PyObject* self, PyObject* args) {
  PyObject *output = nullptr, *function = nullptr, *inputs = nullptr, *constants = nullptr;
  if (PyArg_ParseTuple(args, "OOO!O!", &output, &function, &PyTuple_Type, &inputs, &PyDict_Type, &constants) == 0)
    return nullptr;
  return guarded(
      [&] { return borrowed(remember(*cast<Door>(self), output, function, inputs, constants) ? Py_True : Py_False); });
}

PyMethodDef door_methods[] = {{"remember", door_remember, METH_VARARGS, nullptr}, {}};

// The unpack hook of every stash.
PyObject* unpack(PyObject*, PyObject* handle) {
  if (PyType_IsSubtype(Py_TYPE(handle), reference_type) != 0) return reference_open(handle, nullptr);
  if (PyType_IsSubtype(Py_TYPE(handle), recomputed_type) != 0) return recomputed_open(handle, nullptr);
  return PyObject_CallMethodObjArgs(handle, names().open, nullptr);
}
nb::object opened(PyObject* handle) { return steal(unpack(nullptr, handle)); }
PyMethodDef unpack_method = {"unpack", unpack, METH_O, nullptr};

template <class F>
void* slot(F* function) {
  return reinterpret_cast<void*>(function);
}

PyTypeObject* add_type(nb::module_& m, const char* name, std::size_t size, unsigned flags, PyType_Slot* slots) {
  static constexpr unsigned kDefault = Py_TPFLAGS_DEFAULT;
  PyType_Spec spec{name, static_cast<int>(size), 0, kDefault | flags, slots};
  nb::object type = steal(PyType_FromSpec(&spec));
  m.attr(std::string_view(name).substr(std::string_view(name).rfind('.') + 1).data()) = type;
  return reinterpret_cast<PyTypeObject*>(type.release().ptr());
}

}  // namespace

void bind_stash(nb::module_& core) {
  nb::module_ m = core.def_submodule("stash", "The hot path of unswag.torch.stash, which says what its types mean.");
  PyType_Slot lease_slots[] = {
      {Py_tp_new, slot(lease_new)},
      {Py_tp_dealloc, slot(lease_dealloc)},
      {Py_tp_members, lease_members},
      {Py_tp_methods, lease_methods},
      {},
  };
  lease_type = add_type(m, "unswag._core.stash.Lease", sizeof(Lease), 0, lease_slots);
  PyType_Slot leases_slots[] = {
      {Py_tp_new, slot(leases_new)},
      {Py_tp_dealloc, slot(leases_dealloc)},
      {Py_tp_methods, leases_methods},
      {Py_mp_length, slot(leases_len)},
      {},
  };
  leases_type = add_type(m, "unswag._core.stash.Leases", sizeof(Leases), 0, leases_slots);
  PyType_Slot reference_slots[] = {
      {Py_tp_new, slot(reference_new)},
      {Py_tp_dealloc, slot(reference_dealloc)},
      {Py_tp_members, reference_members},
      {Py_tp_methods, reference_methods},
      {},
  };
  reference_type = add_type(m, "unswag._core.stash.Reference", sizeof(Reference), Py_TPFLAGS_BASETYPE, reference_slots);
  PyType_Slot results_slots[] = {{Py_tp_new, slot(results_new)}, {Py_tp_dealloc, slot(results_dealloc)}, {}};
  results_type = add_type(m, "unswag._core.stash.Results", sizeof(Results), 0, results_slots);
  PyType_Slot recipe_slots[] = {
      {Py_tp_new, slot(recipe_new)}, {Py_tp_dealloc, slot(recipe_dealloc)}, {Py_tp_members, recipe_members}, {}};
  recipe_type = add_type(m, "unswag._core.stash.Recipe", sizeof(Recipe), Py_TPFLAGS_BASETYPE, recipe_slots);
  PyType_Slot recomputed_slots[] = {
      {Py_tp_new, slot(recomputed_new)},
      {Py_tp_dealloc, slot(recomputed_dealloc)},
      {Py_tp_members, recomputed_members},
      {Py_tp_methods, recomputed_methods},
      {},
  };
  recomputed_type = add_type(m, "unswag._core.stash.Recomputed", sizeof(Recomputed), Py_TPFLAGS_BASETYPE, recomputed_slots);
  PyType_Slot weak_storage_slots[] = {
      {Py_tp_new, slot(weak_storage_new)},
      {Py_tp_dealloc, slot(weak_storage_dealloc)},
      {Py_tp_members, weak_storage_members},
      {Py_tp_methods, weak_storage_methods},
      {},
  };
  weak_storage_type = add_type(m, "unswag._core.stash.WeakStorage", sizeof(WeakStorage), 0, weak_storage_slots);
  PyType_Slot output_slots[] = {
      {Py_tp_new, slot(output_new)}, {Py_tp_dealloc, slot(output_dealloc)}, {Py_tp_members, output_members}, {}};
  output_type = add_type(m, "unswag._core.stash.Output", sizeof(Output), Py_TPFLAGS_BASETYPE, output_slots);
  PyType_Slot door_slots[] = {
      {Py_tp_new, slot(door_new)},
      {Py_tp_dealloc, slot(door_dealloc)},
      {Py_tp_traverse, slot(door_traverse)},
      {Py_tp_clear, slot(door_clear)},
      {Py_tp_call, slot(door_call)},
      {Py_tp_methods, door_methods},
      {},
  };
  door_type = add_type(m, "unswag._core.stash.Door", sizeof(Door), Py_TPFLAGS_HAVE_GC, door_slots);
  m.attr("unpack") = steal(PyCFunction_NewEx(&unpack_method, nullptr, nullptr));
}

}  // namespace unswag::python

// The hot path of unswag.torch.stash: what a training step does about a thousand times.  `Door` makes the handles of parameters
// and of tensors held by reference; all else it hands to `Stash.door` (stash/door.py), which does the same as this file and
// more, and says why.  The types are plain CPython ones: an object of nanobind's costs as much as what is done with it.  Leases
// and handles are unknown to the garbage collector, which would run more often for them and cannot follow the graph that owns
// them anyway.
#include <nanobind/nanobind.h>
#include <structmember.h>

#include <cstdint>
#include <memory>
#include <new>
#include <unordered_map>
#include <utility>

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

// ---- leases: one for each storage that is held by reference.  A lease lives as long as a handle that holds the storage, so
// the address of a storage cannot be that of another one while its lease is here.

struct Lease;
using Table = std::unordered_map<Key, Lease*>;

struct Lease {
  PyObject_HEAD PyObject* weak;
  PyObject* replaceable;
  PyObject* writers;
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
PyObject* lease_protects(PyObject* self, PyObject* node) {
  Lease* lease = cast<Lease>(self);
  if (lease->checked == 0) Py_RETURN_FALSE;
  return guarded([&]() -> PyObject* {
    for (Py_ssize_t i = 0, n = PyTuple_Size(lease->writers); i < n; ++i) {
      const nb::object backward = nb::steal(PyObject_GetAttr(PyTuple_GetItem(lease->writers, i), names().backward_class));
      if (!backward.is_valid()) PyErr_Clear();
      if (backward.ptr() != reinterpret_cast<PyObject*>(Py_TYPE(node))) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
  });
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
nb::object add(PyObject* leases, Key key, bool checked) {
  Lease* lease = new_lease(lease_type, checked);
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
  Key key = 0;
  int checked = 0;
  if (PyArg_ParseTuple(args, "Lp", &key, &checked) == 0) return nullptr;
  return guarded([&] { return add(self, key, checked != 0).release().ptr(); });
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

PyObject* borrowed(PyObject* object) {
  Py_INCREF(object);
  return object;
}

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
  return guarded([&] {
    return new_reference(type, alias_of(t), version_of(t), tier, role, model, nb::borrow(lease));
  });
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

// ---- the door

struct Door {
  PyObject_HEAD
  // Held: the stash's own door, its method for tensors with a recipe, its registries, and what it marks handles with.
  PyObject* slow;
  PyObject* recompute;
  PyObject* leases;
  PyObject* outputs;
  PyObject* marks;
  PyObject* pending;
  PyObject* state;
  PyObject* model;
  PyObject* by_reference;  // the type ByReference
  PyObject* unusual;       // globals of the code whose saved tensors need a look: PyTorch's checkpoint and autograd.Function
  PyObject* collect;       // None, or what is told of each tensor in the recompute of a checkpoint
  PyObject* placeholder;   // what it is told: a type
};
constexpr Py_ssize_t kHeld = 12;

PyObject** held(PyObject* self) { return &cast<Door>(self)->slow; }

PyTypeObject* door_type = nullptr;

PyObject* door_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject* values[kHeld] = {};
  if (PyArg_ParseTuple(args, "OOO!O!O!O!OOO!O!OO", &values[0], &values[1], leases_type, &values[2], &PyDict_Type, &values[3],
                       &PyDict_Type, &values[4], &PyDict_Type, &values[5], &values[6], &values[7], &PyType_Type, &values[8],
                       &PyTuple_Type, &values[9], &values[10], &values[11]) == 0)
    return nullptr;
  if (PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(values[8]), reference_type) == 0) {
    PyErr_SetString(PyExc_TypeError, "Door: by_reference is not a subclass of Reference");
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

// The key of a tensor's storage, or none where it has none of its own.
bool key_of(PyObject* t, Key* key) {
  static PyObject* const strided = nb::object(nb::module_::import_("torch").attr("strided")).release().ptr();
  if (attribute(t, names().layout).ptr() != strided) return false;
  const nb::object storage = method(t, names().storage);
  *key = PyLong_AsLongLong(attribute(storage.ptr(), names().address).ptr());
  return true;
}

// Whether t, or what it is a view of, was made by a cast: it may be autocast's copy of a parameter, or of an output.
bool is_cast(PyObject* t, PyObject* base) {
  static PyTypeObject* cast_node = nullptr;  // the one type of node with that name, once it was seen
  const nb::object node = attribute(base == Py_None ? t : base, names().grad_fn);
  if (node.is_none()) return false;
  if (Py_TYPE(node.ptr()) == cast_node) return true;
  const nb::object name = method(node.ptr(), names().name);
  if (PyUnicode_CompareWithASCIIString(name.ptr(), "ToCopyBackward0") != 0) return false;
  if (cast_node == nullptr) cast_node = reinterpret_cast<PyTypeObject*>(borrowed(reinterpret_cast<PyObject*>(Py_TYPE(node.ptr()))));
  return true;
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
  if (!key_of(t, &found.key)) return found;
  found.plain = true;
  if (Lease* lease = find(door.leases, found.key)) {
    found.plain = false;
    if (lease->replaceable == Py_None && lease_fits(*lease))
      found.handle = make(door, t, names().shared_tier, nb::borrow(reinterpret_cast<PyObject*>(lease)));
  }
  return found;
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
    if (output != nullptr) {
      nb::object handle = steal(PyObject_CallFunctionObjArgs(door.recompute, t, output, nullptr));
      return handle.is_none() ? nb::object() : handle;
    }
  }
  if (PyDict_Size(door.marks) != 0 || PyDict_Size(door.pending) != 0 || is_cast(t, found.base.ptr())) return {};
  return make(door, t, names().device_tier, add(door.leases, found.key, true));
}

PyObject* door_call(PyObject* self, PyObject* args, PyObject*) {
  PyObject* t = nullptr;
  if (PyArg_ParseTuple(args, "O", &t) == 0) return nullptr;
  return guarded([&]() -> PyObject* {
    const Door& door = *cast<Door>(self);
    nb::object handle = fast(door, t);
    if (!handle.is_valid()) handle = steal(PyObject_CallFunctionObjArgs(door.slow, t, nullptr));
    if (door.collect != Py_None) {
      const nb::object told = steal(PyObject_CallFunctionObjArgs(
          door.placeholder, handle.ptr(), attribute(t, names().shape).ptr(), attribute(t, names().dtype).ptr(),
          attribute(t, names().device).ptr(), nullptr));
      steal(PyObject_CallFunctionObjArgs(door.collect, told.ptr(), nullptr));
    }
    return handle.release().ptr();
  });
}

// A handle for `t`, an input of the op of `node`, if it is a parameter or held by an op that protects it; else None.
PyObject* door_input(PyObject* self, PyObject* args) {
  PyObject *t = nullptr, *node = nullptr;
  if (PyArg_ParseTuple(args, "OO", &t, &node) == 0) return nullptr;
  return guarded([&]() -> PyObject* {
    Found found = find_held(*cast<Door>(self), t, [&](Lease& lease) {
      const nb::object protects = steal(lease_protects(reinterpret_cast<PyObject*>(&lease), node));
      return protects.is(nb::bool_(true));
    });
    return found.handle.is_valid() ? found.handle.release().ptr() : borrowed(Py_None);
  });
}
PyMethodDef door_methods[] = {{"input", door_input, METH_VARARGS, nullptr}, {}};

// The unpack hook of every stash.
PyObject* unpack(PyObject*, PyObject* handle) {
  if (PyType_IsSubtype(Py_TYPE(handle), reference_type) != 0) return reference_open(handle, nullptr);
  return PyObject_CallMethodObjArgs(handle, names().open, nullptr);
}
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
  PyType_Slot door_slots[] = {
      {Py_tp_new, slot(door_new)},     {Py_tp_dealloc, slot(door_dealloc)}, {Py_tp_traverse, slot(door_traverse)},
      {Py_tp_clear, slot(door_clear)}, {Py_tp_call, slot(door_call)},       {Py_tp_methods, door_methods},
      {},
  };
  door_type = add_type(m, "unswag._core.stash.Door", sizeof(Door), Py_TPFLAGS_HAVE_GC, door_slots);
  m.attr("unpack") = steal(PyCFunction_NewEx(&unpack_method, nullptr, nullptr));
}

}  // namespace unswag::python

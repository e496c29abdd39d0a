// Facts about a module and about what it shares with others, checked in each call of a replaced method: what
// patterns/proof.py and patterns/lora.py say in Python, without a Python frame and a tuple per question.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string_view.h>

#include <algorithm>
#include <string_view>
#include <utility>
#include <vector>

#include "common.hpp"

namespace unswag::python {

using namespace nb::literals;

namespace {

// What a fact says.  A holder of None is the module's __dict__, or for `attribute` its class.
enum class Kind {
  item,       // the entry of the dict is `value`, or equal to it
  entry,      // the entry of the dict is `value`
  attribute,  // the attribute of the holder is `value`, or equal to it
  type,       // the holder is of the type `value`, and of no subclass
  size,       // the holder has `value` entries
  missing,    // the dict has no `key`
  unset,      // the table of the module named by the holder (its _parameters, say) has nothing but None for `key`, and its
              // __dict__ nothing
  unknown,    // neither the module's __dict__, its class nor one of the tables named by the holder has `key`
};
constexpr std::pair<Kind, std::string_view> kinds[] = {
    {Kind::item, "item"}, {Kind::entry, "entry"},     {Kind::attribute, "attribute"}, {Kind::type, "type"},
    {Kind::size, "size"}, {Kind::missing, "missing"}, {Kind::unset, "unset"},         {Kind::unknown, "unknown"},
};

struct Fact {
  Kind kind;
  PyObject* holder;
  PyObject* key;
  PyObject* value;
};

struct Facts {
  std::vector<Fact> facts;

  ~Facts() { clear(); }
  Facts() = default;
  Facts(const Facts&) = delete;
  Facts& operator=(const Facts&) = delete;
  void clear() {
    for (const Fact& fact : std::exchange(facts, {}))
      for (PyObject* held : {fact.holder, fact.key, fact.value}) Py_XDECREF(held);
  }
};

// -1 with a Python error where Python's own comparison raises.
int is(PyObject* found, PyObject* value) {
  if (found == value) return 1;
  if (found == nullptr || (PyList_Check(value) != 0 && Py_TYPE(found) != Py_TYPE(value))) return 0;
  return PyObject_RichCompareBool(found, value, Py_EQ);
}
int attribute_is(PyObject* holder, PyObject* name, PyObject* value) {
  PyObject* found = PyObject_GetAttr(holder, name);
  if (found == nullptr) return -1;
  const int same = is(found, value);
  Py_DECREF(found);
  return same;
}
bool has(PyObject* dict, PyObject* key) { return PyDict_GetItem(dict, key) != nullptr; }

int holds(const Fact& fact, PyObject* own, PyObject* cls) {
  PyObject* dict = fact.holder == Py_None ? own : fact.holder;
  switch (fact.kind) {
    case Kind::item: return is(PyDict_GetItem(dict, fact.key), fact.value);
    case Kind::entry: return static_cast<int>(PyDict_GetItem(dict, fact.key) == fact.value);
    case Kind::attribute: return attribute_is(fact.holder == Py_None ? cls : fact.holder, fact.key, fact.value);
    case Kind::type: return static_cast<int>(reinterpret_cast<PyObject*>(Py_TYPE(fact.holder)) == fact.value);
    case Kind::size: return static_cast<int>(PyObject_Size(fact.holder) == PyLong_AsSsize_t(fact.value));
    case Kind::missing: return static_cast<int>(!has(dict, fact.key));
    case Kind::unset: {
      PyObject* table = PyDict_GetItem(own, fact.holder);
      if (table == nullptr || PyDict_Check(table) == 0) return 0;
      PyObject* found = PyDict_GetItem(table, fact.key);
      return static_cast<int>((found == nullptr || found == Py_None) && !has(own, fact.key));
    }
    case Kind::unknown: {
      if (has(own, fact.key) || PyObject_HasAttr(cls, fact.key) != 0) return 0;
      for (Py_ssize_t i = 0, n = PyTuple_Size(fact.holder); i < n; ++i) {
        PyObject* table = PyDict_GetItem(own, PyTuple_GetItem(fact.holder, i));
        if (table == nullptr || PyDict_Check(table) == 0 || has(table, fact.key)) return 0;
      }
      return 1;
    }
  }
  return 0;
}

bool hold(const Facts& facts, nb::handle own, nb::handle cls) {
  if (PyDict_Check(own.ptr()) == 0) return false;
  // An index: a comparison may run Python code, and that may clear the facts.
  for (std::size_t i = 0; i < facts.facts.size(); ++i) {
    if (holds(facts.facts[i], own.ptr(), cls.ptr()) == 1) continue;
    PyErr_Clear();
    return false;
  }
  return true;
}

bool needs_dict(Kind kind) { return kind == Kind::item || kind == Kind::entry || kind == Kind::missing; }

void init(Facts* self, const nb::list& facts) {
  new (self) Facts;
  for (const nb::handle given : facts) {
    const nb::tuple fact = nb::cast<nb::tuple>(given);
    const auto name = nb::cast<std::string_view>(fact[0]);
    const auto* const found = std::ranges::find(kinds, name, &std::pair<Kind, std::string_view>::second);
    const nb::object holder = fact[1], key = fact[2], value = fact[3];
    if (found == std::end(kinds) || (needs_dict(found->first) && !holder.is_none() && PyDict_Check(holder.ptr()) == 0))
      throw nb::type_error("Facts: a fact is (kind, holder, key, value), and what has entries is a dict");
    self->facts.push_back(
        {found->first, nb::object(holder).release().ptr(), nb::object(key).release().ptr(), nb::object(value).release().ptr()});
  }
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  for (const Fact& fact : nb::inst_ptr<Facts>(self)->facts)
    for (PyObject* held : {fact.holder, fact.key, fact.value}) Py_VISIT(held);
  return 0;
}
int clear(PyObject* self) {
  nb::inst_ptr<Facts>(self)->clear();
  return 0;
}
PyType_Slot slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse)}, {Py_tp_clear, reinterpret_cast<void*>(clear)}, {}};

}  // namespace

void bind_facts(nb::module_& m) {
  nb::class_<Facts>(m, "Facts", nb::type_slots(slots), "What was true of a module and of what it shares, as a list of facts.")
      .def("__init__", &init, "facts"_a, "facts: (kind, holder, key, value) each; bindings/facts.cpp lists the kinds.")
      .def("hold", &hold, "own"_a, "cls"_a, "Whether all are still true of a module with this __dict__ and this class.");
}

}  // namespace unswag::python

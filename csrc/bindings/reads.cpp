#include <vector>

#include "bindings.h"

namespace fastbert::bindings {
namespace {

// An entry of a dict, borrowed; null where there is none. What else is a table may have a say of its own in what it
// returns: it has no entry here.
PyObject* entry(PyObject* table, PyObject* name) {
    PyObject* value = PyDict_CheckExact(table) ? PyDict_GetItemWithError(table, name) : nullptr;
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

// Python's bool(object).
bool is_true(PyObject* object) {
    const py::object held = py::reinterpret_borrow<py::object>(object);
    const int answer = PyObject_IsTrue(held.ptr());
    if (answer < 0) throw py::error_already_set();
    return answer;
}

// The __dict__ of an object; nothing where it has none.
py::object table_of(PyObject* object) {
    PyObject* table = PyObject_GenericGetDict(object, nullptr);
    if (!table) PyErr_Clear();
    return py::reinterpret_steal<py::object>(table);
}

// `hold` of fastbert/reads.py says what this is. It goes over all objects once for each thing it asks of them, and not
// once over all: after a model's weights have passed through the cache, nearly everything it reads comes from memory,
// and a processor waits for several places at a time where no answer hangs on another.
bool unchanged(const py::list& owners, const py::list& tables, const py::list& names, const py::list& values,
               const py::list& plain, const py::list& kinds, const py::tuple& hooks) {
    static PyObject* const own = PyUnicode_InternFromString("__dict__");
    static PyObject* const forward = PyUnicode_InternFromString("forward");
    std::vector<py::object> found;
    found.reserve(owners.size() + plain.size());
    for (const py::list* objects : {&owners, &plain})
        for (const py::handle object : *objects) {
            found.push_back(table_of(object.ptr()));
            if (!found.back()) return false;
        }
    for (size_t i = 0; i < owners.size(); ++i) {
        PyObject* name = PyList_GET_ITEM(tables.ptr(), i);
        if (name == own) continue;
        PyObject* table = entry(found[i].ptr(), name);
        if (!table) return false;
        found[i] = py::reinterpret_borrow<py::object>(table);
    }
    size_t at = 0;
    for (size_t i = 0; i < owners.size(); ++i)
        for (const py::handle name : py::reinterpret_borrow<py::tuple>(PyList_GET_ITEM(names.ptr(), i)))
            if (entry(found[i].ptr(), name.ptr()) != PyList_GET_ITEM(values.ptr(), at++)) return false;
    for (size_t i = 0; i < plain.size(); ++i) {
        if (reinterpret_cast<PyObject*>(Py_TYPE(PyList_GET_ITEM(plain.ptr(), i))) != PyList_GET_ITEM(kinds.ptr(), i))
            return false;
        PyObject* table = found[owners.size() + i].ptr();
        for (const py::handle hook : hooks) {
            PyObject* hung = entry(table, hook.ptr());
            if (!hung || is_true(hung)) return false;
        }
        if (entry(table, forward)) return false;
    }
    return true;
}

}  // namespace

void bind_reads(py::module_& m) { m.def("unchanged", &unchanged); }

}  // namespace fastbert::bindings

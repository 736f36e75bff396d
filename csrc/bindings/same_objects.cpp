#include "bindings.h"

namespace fastbert::bindings {
namespace {

PyObject* item(const py::list& list, Py_ssize_t i) { return PyList_GET_ITEM(list.ptr(), i); }

const PyDictObject* dict_of(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict); }

// The caches hold weights by now: objects are loaded some iterations before they are compared.
constexpr size_t AHEAD = 6;

// What a dict holds under a key, or None.
PyObject* value_of(PyObject* dict, PyObject* key) {
    PyObject* found = PyDict_GetItemWithError(dict, key);
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    return found ? found : Py_None;
}

}  // namespace

// The check of a module tree, once per call of a model: see fastbert/native/freshness.py.
void bind_same_objects(py::module_& m) {
    m.def("same_objects", [](const py::list& objects, const py::list& classes, const py::list& dicts,
                             const py::list& keys, const py::list& values, const py::list& tables,
                             const py::list& contents) {
        if (objects.size() != classes.size() || dicts.size() != keys.size() || dicts.size() != values.size())
            throw py::value_error("same_objects: lists of different lengths");
        for (size_t i = 0; i < objects.size(); ++i) {
            if (i + AHEAD < objects.size()) __builtin_prefetch(item(objects, i + AHEAD));
            if (reinterpret_cast<PyObject*>(Py_TYPE(item(objects, i))) != item(classes, i)) return false;
        }
        for (size_t i = 0; i < dicts.size(); ++i) {
            if (i + 2 * AHEAD < dicts.size()) __builtin_prefetch(item(dicts, i + 2 * AHEAD));
            if (i + AHEAD < dicts.size()) __builtin_prefetch(dict_of(item(dicts, i + AHEAD))->ma_keys);
            if (value_of(item(dicts, i), item(keys, i)) != item(values, i)) return false;
        }
        const auto count = static_cast<Py_ssize_t>(contents.size());
        Py_ssize_t at = 0;
        for (size_t i = 0; i < tables.size(); ++i, ++at) {
            if (i + AHEAD < tables.size()) __builtin_prefetch(dict_of(item(tables, i + AHEAD))->ma_keys);
            PyObject *key, *value;
            for (Py_ssize_t next = 0; PyDict_Next(item(tables, i), &next, &key, &value); at += 2)
                if (at + 2 >= count || item(contents, at) != key || item(contents, at + 1) != value) return false;
            if (at >= count || item(contents, at) != Py_None) return false;
        }
        return true;
    });
}

}  // namespace fastbert::bindings

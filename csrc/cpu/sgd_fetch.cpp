// The tensors of a step of SGD, from its parameters: their gradients and, out of the optimizer's
// state, their momentum buffers. Python's own functions find them, called from here: between two
// of Python's iterators, each of many small tensors takes longer.
//
// To be called with Python's lock held. Both return a new reference, or null after an error of
// Python's, which ctypes raises.
#include "host/sgd_table.h"

extern "C" __attribute__((visibility("default"))) void* fastopt_sgd_grads(
    const fastopt::SgdPython* python, void* const* params, int64_t count) {
  void* const grads = python->PyTuple_New(count);
  for (int64_t i = 0; grads != nullptr && i < count; ++i) {
    void* const grad = python->PyObject_GetAttr(params[i], python->grad);
    // SetItem takes the reference over, even if it fails.
    if (grad == nullptr || python->PyTuple_SetItem(grads, i, grad) != 0) {
      python->Py_DecRef(grads);
      return nullptr;
    }
  }
  return grads;
}

// The momentum buffers, each None where there is none. Or None in place of the tuple, unless the
// state is of exactly these parameters in this order, a dict for each.
extern "C" __attribute__((visibility("default"))) void* fastopt_sgd_momentum_buffers(
    const fastopt::SgdPython* python, void* const* params, int64_t count, void* state) {
  void* const buffers = python->PyTuple_New(count);
  if (buffers == nullptr) return nullptr;
  ptrdiff_t place = 0;
  void* param;
  void* entry;
  for (int64_t i = 0; i < count; ++i) {
    if (python->PyDict_Next(state, &place, &param, &entry) == 0 || param != params[i] ||
        *reinterpret_cast<void**>(static_cast<char*>(entry) + python->type_offset) !=
            python->dict) {
      python->Py_DecRef(buffers);
      python->Py_IncRef(python->none);
      return python->none;
    }
    python->Py_IncRef(entry);  // comparing keys may run Python, which may drop it
    void* buffer = python->PyDict_GetItemWithError(entry, python->momentum_buffer);
    if (buffer == nullptr && python->PyErr_Occurred() == nullptr) buffer = python->none;
    if (buffer != nullptr) python->Py_IncRef(buffer);
    python->Py_DecRef(entry);
    if (buffer == nullptr || python->PyTuple_SetItem(buffers, i, buffer) != 0) {
      python->Py_DecRef(buffers);
      return nullptr;
    }
  }
  return buffers;
}

// What SGD's kernels are given, on either device: plain structs, no torch type.
// fastopt/sgd/table.py declares the same, under the same names; tests/test_sgd_table.py compares
// every place and size.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastopt {

enum class SgdElement : int8_t { float32, float64, bfloat16, float16 };

// The options that are numbers, in torch's order: that of everything that lists them.
enum SgdOption { kLr, kMomentum, kDampening, kWeightDecay };

// Where an option's value is: in the table, or (never for the CPU's kernels) on the device in one
// of these types.
enum class SgdSource : uint8_t { value, float32, float64, bfloat16, float16 };

// Which parameters of a group the kernels take: torch raises for all but float64 where a finite
// option exceeds float32.
enum class SgdServed : uint8_t { none, float64, all };

// One parameter group.
struct SgdGroup {
  union {
    double value;
    const void* address;
  } options[4];
  SgdSource source[4];
  bool nesterov, maximize;
  bool has_momentum;  // or perhaps: only the device knows
  SgdServed served;
};

// One parameter: its memory, which is `numel` elements in the same order in all three.
struct SgdRow {
  void* param;
  void* grad;
  void* momentum_buffer;  // null without momentum
  int64_t numel;          // 0: nothing to do for this one
  int64_t first_block;  // where this row's blocks of work begin among all; whoever cuts them writes
  int32_t group;
  SgdElement element;
  bool first_step;  // CPU: the buffer receives its first gradient. GPU: see SgdLaunch
};

// What becomes of a parameter.
enum SgdVerdict : uint8_t {
  kReady = 1,         // the kernels update it
  kNoGradient = 2,    // nothing to do
  kNeedsBuffer = 4,   // its first step with momentum: the caller makes the buffer and comes again
  kTorch = 8,         // torch's path takes it
  kOverlapping = 16,  // memory is shared between rows: torch's path takes them, one by one
};

// Memory that a step writes.
struct SgdSpan {
  uintptr_t begin, end;
};

// What lasts from step to step where tensors are gathered (csrc/cpu/sgd.cpp): no address of a
// tensor that a later step would believe. Arrays have one entry per parameter unless said
// otherwise, and live as long as the table does.
struct SgdTable {
  const int32_t* group_of;  // null: all are of one group
  SgdRow* rows;             // written by gather
  SgdVerdict* verdicts;     // written by fastopt_sgd_gather_cpu alone
  SgdSpan* spans;           // two per parameter: what the step writes, sorted
  int64_t count;

  // Where a tensor object keeps its type and its C++ tensor, and that its keys for the dispatcher.
  int64_t type_offset, tensor_offset, keys_offset;
  const void *tensor_type, *parameter_type, *none;
  // The keys of a plain dense tensor of the kernels' device. Others are sparse, hold the negative
  // or the conjugate of their values, were made in inference mode, or belong to a mode of torch.
  uint64_t keys;
  int64_t device_index;  // -1: there is only one

  // Python's own functions around what may run without its lock.
  void* (*save_thread)();
  void (*restore_thread)(void*);

  int64_t span_count;  // or what class Rows writes instead. Starts as 0, like busy
  int64_t busy;        // a thread that let go of Python's lock is still using rows and spans
};

// Functions of Python's stable ABI, and objects, for csrc/cpu/sgd_fetch.cpp.
struct SgdPython {
  void* (*PyObject_GetAttr)(void* object, void* name);
  int (*PyDict_Next)(void* dict, ptrdiff_t* place, void** key, void** value);
  void* (*PyDict_GetItemWithError)(void* dict, void* key);
  void* (*PyErr_Occurred)();
  void* (*PyTuple_New)(ptrdiff_t size);
  int (*PyTuple_SetItem)(void* tuple, ptrdiff_t place, void* item);
  void (*Py_IncRef)(void* object);
  void (*Py_DecRef)(void* object);
  void *grad, *momentum_buffer;  // names
  void *none, *dict;
  int64_t type_offset;  // as in SgdTable
};

// A whole step on a GPU. Host memory but for the addresses marked (device).
struct SgdLaunch {
  const SgdRow* rows;
  int64_t count;
  const SgdGroup* groups;
  int64_t group_count;
  int32_t* started;         // (device) one per row: 1 once its momentum buffer holds a value
  uint32_t* arrived;        // (device) 0 between launches: counts the blocks that are done
  const float* grad_scale;  // (device) null, or gradients are divided by it
  const float* found_inf;   // (device) null, or anything but 0 leaves parameters and state alone
  int64_t processors;       // of the device
};

}  // namespace fastopt

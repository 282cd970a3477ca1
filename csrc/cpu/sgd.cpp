// SGD on CPU, below fastopt/sgd/step.py: one call reads the tensors of a step, decides whether the
// kernels serve them and updates them, in one parallel region for all parameters of all groups,
// balanced by elements. No Python runs between the reading of an address and its use.
//
// GPUs use `gather` alone, for one device at a time (fastopt/sgd/devices.py): it reads what torch
// knows of a tensor, never its values.
//
// Host time is the whole cost of a step over many small tensors, and Python spends 60 ns on
// every attribute it reads of a tensor. So Python hands over tuples, not addresses, and the
// tensors are read here, at 30 ns for all that is asked of one, afresh in every step: nothing
// about memory is remembered that could have gone stale.
#include "sgd.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

namespace fastopt {
namespace {

// The tensors of one step: tuples of Python objects, given by the addresses of their items.
struct SgdTensors {
  const char* const* params;
  const char* const* grads;
  const char* const* momentum_buffers;  // null when no group has momentum
  const bool* first_step;               // null: no parameter takes its first step
};

struct TensorView {
  char* data;
  int64_t numel, dim;
  const int64_t *sizes, *strides;
  int32_t dtype;
};

bool element_of(int32_t dtype, SgdElement& element) {
  static const int32_t float32 = aoti_torch_dtype_float32();
  static const int32_t float64 = aoti_torch_dtype_float64();
  static const int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  static const int32_t float16 = aoti_torch_dtype_float16();
  if (dtype == float32) {
    element = SgdElement::float32;
  } else if (dtype == float64) {
    element = SgdElement::float64;
  } else if (dtype == bfloat16) {
    element = SgdElement::bfloat16;
  } else if (dtype == float16) {
    element = SgdElement::float16;
  } else {
    return false;
  }
  return true;
}

int64_t bytes_of(SgdElement element) {
  switch (element) {
    case SgdElement::float64:
      return 8;
    case SgdElement::float32:
      return 4;
    default:
      return 2;
  }
}

// Reads a tensor that the kernels can take: exactly a Tensor or Parameter, plain and strided, on
// the kernels' device.
bool view(const SgdTable& table, const char* object, TensorView& v) {
  const void* type;
  std::memcpy(&type, object + table.type_offset, sizeof(type));
  if (type != table.tensor_type && type != table.parameter_type) return false;
  // The object holds an at::Tensor, whose address is an AtenTensorHandle; that points to the rest.
  const char* const held = object + table.tensor_offset;
  const char* implementation;
  std::memcpy(&implementation, held, sizeof(implementation));
  uint64_t keys;
  std::memcpy(&keys, implementation + table.keys_offset, sizeof(keys));
  if (keys != table.keys) return false;
  const auto tensor = reinterpret_cast<AtenTensorHandle>(const_cast<char*>(held));
  int32_t device_index = -1;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  void* data = nullptr;
  if ((table.device_index >= 0 &&
       (aoti_torch_get_device_index(tensor, &device_index) != AOTI_TORCH_SUCCESS ||
        device_index != table.device_index)) ||
      aoti_torch_get_dtype(tensor, &v.dtype) != AOTI_TORCH_SUCCESS ||
      aoti_torch_get_numel(tensor, &v.numel) != AOTI_TORCH_SUCCESS ||
      aoti_torch_get_dim(tensor, &v.dim) != AOTI_TORCH_SUCCESS ||
      aoti_torch_get_sizes(tensor, &sizes) != AOTI_TORCH_SUCCESS ||
      aoti_torch_get_strides(tensor, &strides) != AOTI_TORCH_SUCCESS ||
      aoti_torch_get_data_ptr(tensor, &data) != AOTI_TORCH_SUCCESS) {
    return false;
  }
  if (v.numel > 0 && data == nullptr) return false;  // its memory was freed
  v.data = static_cast<char*>(data);
  v.sizes = sizes;
  v.strides = strides;
  return true;
}

// Whether the elements fill one block of memory, in whatever order of the dimensions.
bool is_dense(const TensorView& v) {
  int64_t expected = 1;
  bool contiguous = true;
  for (int64_t d = v.dim - 1; d >= 0 && contiguous; --d) {
    contiguous = v.sizes[d] == 1 || v.strides[d] == expected;
    expected *= v.sizes[d];
  }
  if (contiguous || v.numel == 0) return true;
  // From the fastest dimension outwards, each must step over exactly what lies inside it.
  for (int64_t inner = 1; inner < v.numel;) {
    int64_t d = 0;
    while (d < v.dim && (v.sizes[d] == 1 || v.strides[d] != inner)) ++d;
    if (d == v.dim) return false;
    inner *= v.sizes[d];
  }
  return true;
}

// Same shape, same type and, element by element, the same order in memory.
bool matches(const TensorView& a, const TensorView& b) {
  if (a.dtype != b.dtype || a.dim != b.dim) return false;
  for (int64_t d = 0; d < a.dim; ++d) {
    if (a.sizes[d] != b.sizes[d]) return false;
    if (a.sizes[d] > 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

SgdVerdict gather_row(const SgdTable& table, const SgdTensors& tensors, const SgdGroup* groups,
                      int64_t i, SgdRow& row) {
  row.numel = 0;
  if (tensors.grads[i] == table.none) return kNoGradient;
  row.group = table.group_of == nullptr ? 0 : table.group_of[i];
  const SgdGroup& group = groups[row.group];
  TensorView param;
  TensorView grad;
  if (group.served == SgdServed::none || !view(table, tensors.params[i], param) ||
      !view(table, tensors.grads[i], grad) || !element_of(param.dtype, row.element) ||
      !is_dense(param) || !matches(param, grad) ||
      (group.served == SgdServed::float64 && row.element != SgdElement::float64)) {
    return kTorch;
  }
  row.momentum_buffer = nullptr;
  row.first_step = false;
  if (group.has_momentum) {
    if (tensors.momentum_buffers[i] == table.none) return kNeedsBuffer;
    TensorView buffer;
    if (!view(table, tensors.momentum_buffers[i], buffer) || !matches(param, buffer)) {
      return kTorch;
    }
    row.momentum_buffer = buffer.data;
    row.first_step = tensors.first_step != nullptr && tensors.first_step[i];
  }
  row.param = param.data;
  row.grad = grad.data;
  row.numel = param.numel;
  return kReady;
}

SgdSpan span(const void* data, const SgdRow& row) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  return {begin, begin + static_cast<uintptr_t>(row.numel * bytes_of(row.element))};
}

// Rows of a step, in the table's memory or, while another thread uses that, in memory of their own.
class Rows {
 public:
  explicit Rows(SgdTable& table)
      : shared_(__atomic_exchange_n(&table.busy, 1, __ATOMIC_ACQUIRE) == 0 ? &table : nullptr) {
    if (shared_ != nullptr) {
      rows = table.rows;
      spans_ = table.spans;
      span_count_ = table.span_count;
      return;
    }
    own_rows_.reset(new (std::nothrow) SgdRow[table.count]());
    own_spans_.reset(new (std::nothrow) SgdSpan[2 * table.count]());
    rows = own_rows_.get();
    spans_ = own_spans_.get();
  }

  ~Rows() {
    if (shared_ == nullptr) return;
    shared_->span_count = span_count_;
    __atomic_store_n(&shared_->busy, 0, __ATOMIC_RELEASE);
  }

  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  bool has_memory() const { return rows != nullptr && spans_ != nullptr; }

  // Gathers a row, behind the ones before it.
  SgdVerdict gather(const SgdTable& table, const SgdTensors& tensors, const SgdGroup* groups,
                    int64_t i) {
    SgdRow& row = rows[i];
    const SgdRow before = row;
    const SgdVerdict verdict = gather_row(table, tensors, groups, i, row);
    row.first_block = blocks;
    blocks += (row.numel + kSgdBlock - 1) / kSgdBlock;
    moved_ |= row.numel != before.numel || row.param != before.param ||
              row.momentum_buffer != before.momentum_buffer || row.element != before.element;
    return verdict;
  }

  // Whether rows [begin, end), all that were gathered, share memory that the step writes.
  bool overlap(int64_t begin, int64_t end) {
    // Rarely: parameters and buffers stay where they are.
    if (moved_ || span_count_ == kUnsorted) sort_spans(begin, end);
    if (span_count_ == kOverlap) return true;
    for (int64_t i = begin; i < end; ++i) {
      if (grad_overlaps(rows[i])) return true;
    }
    return false;
  }

  // The spans are not, or will not be, those of all rows.
  void forget_spans() { span_count_ = kUnsorted; }

  SgdRow* rows;
  int64_t blocks = 0;

 private:
  enum : int64_t { kOverlap = -1, kUnsorted = -2 };

  void sort_spans(int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) {
      const SgdRow& row = rows[i];
      if (row.numel == 0) continue;
      spans_[count++] = span(row.param, row);
      if (row.momentum_buffer != nullptr) spans_[count++] = span(row.momentum_buffer, row);
    }
    std::sort(spans_, spans_ + count, [](SgdSpan a, SgdSpan b) { return a.begin < b.begin; });
    span_count_ = count;
    for (int64_t i = 1; i < count; ++i) {
      if (spans_[i].begin < spans_[i - 1].end) span_count_ = kOverlap;
    }
  }

  // Whether the gradient lies in memory that the step writes. It may be its own parameter: every
  // element is read before it is written.
  bool grad_overlaps(const SgdRow& row) const {
    if (row.numel == 0 || row.grad == row.param) return false;
    const SgdSpan grad = span(row.grad, row);
    const SgdSpan* const end = spans_ + span_count_;
    const SgdSpan* const after =
        std::upper_bound(static_cast<const SgdSpan*>(spans_), end, grad.begin,
                         [](uintptr_t begin, SgdSpan written) { return begin < written.end; });
    return after != end && after->begin < grad.end;
  }

  SgdTable* shared_;
  std::unique_ptr<SgdRow[]> own_rows_;
  std::unique_ptr<SgdSpan[]> own_spans_;
  SgdSpan* spans_;
  int64_t span_count_ = 0;
  bool moved_ = false;
};

// A step of up to 131,072 elements (some 40 us) is left to one thread: a second saves less than it
// costs to wake it up, and milliseconds are lost when other programs have its core. Beyond, every
// thread gets at least 32,768 elements, as in torch's own loops.
constexpr int64_t kSerialBlocks = 131072 / kSgdBlock;
constexpr int64_t kGrain = 32768 / kSgdBlock;

void run_blocks(const SgdStep& step, int64_t begin, int64_t end) {
  const SgdRow* const after =
      std::upper_bound(step.rows, step.rows + step.count, begin,
                       [](int64_t block, const SgdRow& row) { return block < row.first_block; });
  FASTOPT_DISPATCH(sgd_blocks, step, after - step.rows - 1, begin, end);
}

// Returns whether torch gave a parallel region. A large step lets go of Python's lock.
bool run(const SgdTable& table, const SgdStep& step, int64_t blocks) {
  if (blocks <= kSerialBlocks) {
    if (blocks != 0) run_blocks(step, 0, blocks);
    return true;
  }
  void* const thread = table.save_thread();
  bool done = true;
  try {
    torch::stable::parallel_for(
        0, blocks, kGrain, [&step](int64_t begin, int64_t end) { run_blocks(step, begin, end); });
  } catch (...) {
    done = false;
  }
  table.restore_thread(thread);
  return done;
}

}  // namespace
}  // namespace fastopt

// All return without an exception: ctypes could not carry one. Not torch ops: those can be called
// by anyone, and a table of addresses cannot be checked. To be called with Python's lock held.

// Python compares: a library left over from other sources would read other structs.
extern "C" __attribute__((visibility("default"))) const int64_t* fastopt_sgd_struct_bytes() {
  using namespace fastopt;
  static const int64_t bytes[] = {sizeof(SgdGroup), sizeof(SgdRow), sizeof(SgdSpan),
                                  sizeof(SgdTable), sizeof(SgdPython)};
  return bytes;
}

// Fills all rows and verdicts. Returns the union of the verdicts.
extern "C" __attribute__((visibility("default"))) int64_t fastopt_sgd_gather_cpu(
    fastopt::SgdTable* table, const char* const* params, const char* const* grads,
    const char* const* momentum_buffers, const fastopt::SgdGroup* groups) noexcept {
  using namespace fastopt;
  Rows rows(*table);
  const SgdTensors tensors = {params, grads, momentum_buffers, nullptr};
  int64_t seen = 0;
  for (int64_t i = 0; i < table->count; ++i) {
    table->verdicts[i] = rows.gather(*table, tensors, groups, i);
    seen |= table->verdicts[i];
  }
  return rows.overlap(0, table->count) ? seen | kOverlapping : seen;
}

// Updates all parameters that have a gradient, or none of them. Returns the union of the verdicts
// up to the first parameter that is not ready, which is then the reason; -1: torch refused the
// parallel region. `inv_scale`: the gradients are multiplied by it first, in memory too.
extern "C" __attribute__((visibility("default"))) int64_t
fastopt_sgd_step_cpu(fastopt::SgdTable* table, const char* const* params, const char* const* grads,
                     const char* const* momentum_buffers, const fastopt::SgdGroup* groups,
                     const double* inv_scale) noexcept {
  using namespace fastopt;
  Rows rows(*table);
  if (!rows.has_memory()) return kTorch;
  const SgdTensors tensors = {params, grads, momentum_buffers, nullptr};
  int64_t seen = 0;
  for (int64_t i = 0; i < table->count; ++i) {
    seen |= rows.gather(*table, tensors, groups, i);
    if ((seen & (kNeedsBuffer | kTorch)) != 0) {
      rows.forget_spans();
      return seen;
    }
  }
  if (rows.overlap(0, table->count)) return seen | kOverlapping;
  const SgdStep step = {rows.rows, table->count, groups, inv_scale != nullptr,
                        inv_scale == nullptr ? 1 : *inv_scale};
  return run(*table, step, rows.blocks) ? seen : -1;
}

// Updates the parameters from `begin` on, up to the first that is not like that one. Returns what
// was found, where those of one kind end, 32 * end + verdict: if that is kReady they are updated.
extern "C" __attribute__((visibility("default"))) int64_t
fastopt_sgd_run_cpu(fastopt::SgdTable* table, const char* const* params, const char* const* grads,
                    const char* const* momentum_buffers, const fastopt::SgdGroup* groups,
                    const double* inv_scale, const bool* first_step, int64_t begin) noexcept {
  using namespace fastopt;
  Rows rows(*table);
  if (!rows.has_memory()) return 32 * table->count + kTorch;
  const SgdTensors tensors = {params, grads, momentum_buffers, first_step};
  rows.forget_spans();
  SgdVerdict verdict = kNoGradient;
  int64_t end = begin;
  for (; end < table->count; ++end) {
    const int64_t blocks = rows.blocks;
    const SgdVerdict found = rows.gather(*table, tensors, groups, end);
    if (end == begin) verdict = found;
    if (found != verdict) {
      rows.blocks = blocks;
      break;
    }
  }
  if (verdict == kReady) {
    if (rows.overlap(begin, end)) return 32 * end + kTorch;
    const SgdStep step = {rows.rows + begin, end - begin, groups, inv_scale != nullptr,
                          inv_scale == nullptr ? 1 : *inv_scale};
    if (!run(*table, step, rows.blocks)) return -1;
  }
  return 32 * end + verdict;
}

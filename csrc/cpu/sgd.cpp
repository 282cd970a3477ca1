// SGD on CPU, below fastopt/optim.py: `gather` turns Python's tuples of tensors into rows of
// addresses and decides what the kernels serve; `run` makes the step, in one parallel region for
// all parameters of all groups, balanced by elements.
//
// GPUs use gather as well, for one device at a time (fastopt/gpu_step.py): it reads what torch
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
#include <cmath>
#include <cstring>
#include <limits>

namespace fastopt {
namespace {

// What became of a parameter. The numbers are fastopt/optim.py's too.
enum Verdict : uint8_t {
  kReady = 1,         // the kernels will update it
  kNoGradient = 2,    // nothing to do
  kNeedsBuffer = 4,   // its first step with momentum: the caller makes the buffer and gathers again
  kTorch = 8,         // torch's path takes it
  kOverlapping = 16,  // memory is shared between rows: torch's path takes all, one by one
  kDone = 32,         // all were ready, and few enough to be updated at once
};

// Memory that a step writes.
struct Span {
  uintptr_t begin, end;
};

}  // namespace

// The caller's table; fastopt/optim.py declares the same struct. Arrays have one entry per
// parameter unless said otherwise, and live as long as the table does.
struct SgdTable {
  // Tuples of Python objects, given by the addresses of their items.
  const char* const* params;
  const char* const* grads;
  const char* const* momentum_buffers;  // null when no group has momentum
  const int32_t* group_of;
  const SgdGroup* groups;  // one per group
  const bool* first_step;  // null: no parameter takes its first step
  SgdRow* rows;            // written by gather
  uint8_t* verdicts;       // written by gather
  Span* spans;             // two per parameter: what the step writes, sorted by gather
  int64_t count;

  // Where a tensor object keeps its type and its C++ tensor, and the objects to compare with.
  int64_t type_offset, tensor_offset;
  const void *tensor_type, *parameter_type, *none;

  double inv_scale;
  int64_t unscale;

  int64_t span_count;  // -1: the spans overlap. Gather's own memory, like the rows: starts as 0

  // The kernels' device (index -1: there is only one): tensors elsewhere are torch's.
  int32_t device_type, device_index;
  int64_t gather_only;  // the rows go to another device: update none here
};

static_assert(sizeof(SgdRow) == 48 && sizeof(SgdGroup) == 56 && sizeof(Span) == 16,
              "fastopt/optim.py makes room for them");

namespace {

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

// torch.imag(z.conj()) is a float tensor whose memory holds the negative. It is the imaginary half
// of something complex, hence has gaps, or one element that does not fill its storage.
bool is_negated(AtenTensorHandle tensor) {
  int64_t offset = 0;
  int64_t storage_bytes = 0;
  int32_t dtype = 0;
  aoti_torch_get_storage_offset(tensor, &offset);
  aoti_torch_get_storage_size(tensor, &storage_bytes);
  aoti_torch_get_dtype(tensor, &dtype);
  if (offset == 0 && storage_bytes == static_cast<int64_t>(aoti_torch_dtype_element_size(dtype))) {
    return false;
  }
  AtenTensorHandle owned = nullptr;  // the call takes its argument's ownership
  if (aoti_torch_new_tensor_handle(tensor, &owned) != AOTI_TORCH_SUCCESS) return true;
  StableIValue stack = torch::stable::detail::from(owned);
  return torch_call_dispatcher("aten::is_neg", "", &stack, TORCH_ABI_VERSION) !=
             AOTI_TORCH_SUCCESS ||
         torch::stable::detail::to<bool>(stack);
}

// Reads a tensor that the kernels can take: exactly a Tensor or Parameter, strided, on the
// kernels' device.
bool view(const SgdTable& table, const char* object, TensorView& v) {
  static const int32_t strided = aoti_torch_layout_strided();
  const void* type;
  std::memcpy(&type, object + table.type_offset, sizeof(type));
  if (type != table.tensor_type && type != table.parameter_type) return false;
  // An AtenTensorHandle is the address of an at::Tensor, and the object holds one.
  const auto tensor =
      reinterpret_cast<AtenTensorHandle>(const_cast<char*>(object + table.tensor_offset));
  int32_t layout = 0;
  int32_t device_type = 0;
  int32_t device_index = -1;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  void* data = nullptr;
  if (aoti_torch_get_layout(tensor, &layout) != AOTI_TORCH_SUCCESS || layout != strided ||
      aoti_torch_get_device_type(tensor, &device_type) != AOTI_TORCH_SUCCESS ||
      device_type != table.device_type ||
      (table.device_index >= 0 &&
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
  if (v.numel > 0 && data == nullptr) return false;  // a tensor of zeros without memory
  if (v.numel == 1 && is_negated(tensor)) return false;
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

// Where a finite option exceeds float32, torch's for-loop raises.
bool fits_float(const SgdGroup& group) {
  const double options[] = {group.lr, group.momentum, 1 - group.dampening, group.weight_decay};
  for (const double option : options) {
    if (std::isfinite(option) && std::fabs(option) > std::numeric_limits<float>::max()) {
      return false;
    }
  }
  return true;
}

Verdict gather_row(const SgdTable& table, int64_t i, SgdRow& row) {
  row.numel = 0;
  if (table.grads[i] == table.none) return kNoGradient;
  const SgdGroup& group = table.groups[table.group_of[i]];
  TensorView param;
  TensorView grad;
  if (group.served == 0 || !view(table, table.params[i], param) ||
      !view(table, table.grads[i], grad) || !element_of(param.dtype, row.element) ||
      !is_dense(param) || !matches(param, grad) ||
      (row.element != SgdElement::float64 && !fits_float(group))) {
    return kTorch;
  }
  row.momentum_buffer = nullptr;
  row.first_step = false;
  if (group.momentum != 0) {
    if (table.momentum_buffers[i] == table.none) return kNeedsBuffer;
    TensorView buffer;
    if (!view(table, table.momentum_buffers[i], buffer) || !matches(param, buffer)) return kTorch;
    row.momentum_buffer = buffer.data;
    row.first_step = table.first_step != nullptr && table.first_step[i];
  }
  row.param = param.data;
  row.grad = grad.data;
  row.numel = param.numel;
  row.group = table.group_of[i];
  return kReady;
}

Span span(const void* data, const SgdRow& row) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  return {begin, begin + static_cast<uintptr_t>(row.numel * bytes_of(row.element))};
}

void sort_spans(SgdTable& table) {
  Span* const spans = table.spans;
  int64_t count = 0;
  for (int64_t i = 0; i < table.count; ++i) {
    const SgdRow& row = table.rows[i];
    if (row.numel == 0) continue;
    spans[count++] = span(row.param, row);
    if (row.momentum_buffer != nullptr) spans[count++] = span(row.momentum_buffer, row);
  }
  std::sort(spans, spans + count, [](Span a, Span b) { return a.begin < b.begin; });
  table.span_count = count;
  for (int64_t i = 1; i < count; ++i) {
    if (spans[i].begin < spans[i - 1].end) table.span_count = -1;
  }
}

// Whether the gradient lies in memory that the step writes. It may be its own parameter: every
// element is read before it is written.
bool grad_overlaps(const SgdTable& table, const SgdRow& row) {
  if (row.numel == 0 || row.grad == row.param) return false;
  const Span grad = span(row.grad, row);
  const Span* const end = table.spans + table.span_count;
  const Span* const after =
      std::upper_bound(static_cast<const Span*>(table.spans), end, grad.begin,
                       [](uintptr_t begin, Span written) { return begin < written.end; });
  return after != end && after->begin < grad.end;
}

// A step of up to 131,072 elements (some 40 us) is left to one thread: a second saves less than it
// costs to wake it up, and milliseconds are lost when other programs have its core. Beyond, every
// thread gets at least 32,768 elements, as in torch's own loops.
constexpr int64_t kSerialBlocks = 131072 / kSgdBlock;
constexpr int64_t kGrain = 32768 / kSgdBlock;

int64_t count_blocks(const SgdTable& table) {
  if (table.count == 0) return 0;
  const SgdRow& last = table.rows[table.count - 1];
  return last.first_block + (last.numel + kSgdBlock - 1) / kSgdBlock;
}

void run_blocks(const SgdTable& table, int64_t begin, int64_t end) {
  const SgdStep step = {table.rows, table.count, table.groups, table.unscale != 0, table.inv_scale};
  const SgdRow* const after =
      std::upper_bound(step.rows, step.rows + step.count, begin,
                       [](int64_t block, const SgdRow& row) { return block < row.first_block; });
  FASTOPT_DISPATCH(sgd_blocks, step, after - step.rows - 1, begin, end);
}

}  // namespace
}  // namespace fastopt

// Both return without an exception: ctypes could not carry one. Not torch ops: those can be called
// by anyone, and a table of addresses cannot be checked.

// Python compares: a library left over from other sources would read another table.
extern "C" __attribute__((visibility("default"))) int64_t fastopt_sgd_table_bytes() {
  return sizeof(fastopt::SgdTable);
}

// Fills rows and verdicts; returns the union of the verdicts. To be called with Python's lock held.
extern "C" __attribute__((visibility("default"))) int64_t
fastopt_sgd_gather_cpu(fastopt::SgdTable* table) noexcept {
  using namespace fastopt;
  int64_t seen = 0;
  int64_t block = 0;
  bool moved = false;
  for (int64_t i = 0; i < table->count; ++i) {
    SgdRow& row = table->rows[i];
    const SgdRow before = row;
    const Verdict verdict = gather_row(*table, i, row);
    row.first_block = block;
    block += (row.numel + kSgdBlock - 1) / kSgdBlock;
    table->verdicts[i] = verdict;
    seen |= verdict;
    moved |= row.numel != before.numel || row.param != before.param ||
             row.momentum_buffer != before.momentum_buffer || row.element != before.element;
  }
  if (moved) sort_spans(*table);  // rarely: parameters and buffers stay where they are
  bool overlapping = table->span_count < 0;
  for (int64_t i = 0; i < table->count && !overlapping; ++i) {
    overlapping = grad_overlaps(*table, table->rows[i]);
  }
  if (overlapping) return seen | kOverlapping;
  if (seen == kReady && block <= kSerialBlocks && table->gather_only == 0) {
    run_blocks(*table, 0, block);
    return kDone;
  }
  return seen;
}

// Updates the rows that gather found ready. Returns 0, or 1 if torch refused the parallel region.
extern "C" __attribute__((visibility("default"))) int64_t
fastopt_sgd_run_cpu(const fastopt::SgdTable* table) noexcept {
  using namespace fastopt;
  const int64_t blocks = count_blocks(*table);
  if (blocks <= kSerialBlocks) {
    run_blocks(*table, 0, blocks);
    return 0;
  }
  try {
    torch::stable::parallel_for(
        0, blocks, kGrain, [table](int64_t begin, int64_t end) { run_blocks(*table, begin, end); });
  } catch (...) {
    return 1;
  }
  return 0;
}

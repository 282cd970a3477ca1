// The ops of cross-entropy, over a back end: the checks of the arguments, tensors seen as (batch,
// class, position), the layout of the gradient, and what each op does in which order. The ops'
// schemas stand in fastopt/ops.py.
//
// torch.ops is callable by anyone: whatever arrives here is checked before memory is touched.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "rules/cross_entropy.h"

namespace fastopt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// ---- checks ----

// The std exceptions arrive in Python as RuntimeError, ValueError and IndexError.
inline void check(bool ok, const char* what) {
  if (!ok) throw std::runtime_error(std::string("fastopt::cross_entropy: ") + what);
}

inline Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::Double:
      return Element::float64;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    case ScalarType::Half:
      return Element::float16;
    default:
      throw std::runtime_error(
          "fastopt::cross_entropy: logits and probabilities must be float32, float64, bfloat16 or "
          "float16");
  }
}

inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// ---- tensors ----

// Where the tensors of a call live, in torch's own numbers.
struct Place {
  int32_t type, index;

  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
};

inline Place place_of(const Tensor& t) {
  // Asking torch for the index costs more than knowing that the CPU has but one.
  if (t.is_cpu()) return {aoti_torch_device_type_cpu(), 0};
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return {type, t.get_device_index()};
}

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            ScalarType type, Place place) {
  int32_t dtype = 0;
  switch (type) {
    case ScalarType::Double:
      dtype = aoti_torch_dtype_float64();
      break;
    case ScalarType::BFloat16:
      dtype = aoti_torch_dtype_bfloat16();
      break;
    case ScalarType::Half:
      dtype = aoti_torch_dtype_float16();
      break;
    default:
      dtype = aoti_torch_dtype_float32();
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, place.type, place.index,
                                                  &handle));
  return Tensor(handle);
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  return std::vector<int64_t>(t.sizes().begin(), t.sizes().end());
}

// Whether every element is there once, in whatever order of dimensions; and, of dense ones, every
// element between the first and the last is the tensor's own.
inline bool has_no_overlap(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                           bool dense = false) {
  std::vector<size_t> order;
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != 1) order.push_back(i);
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  if (!dense && std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return true;
  int64_t expected = 1;
  for (const size_t i : order) {
    if (dense ? strides[i] != expected : strides[i] < expected) return false;
    expected = strides[i] * sizes[i];
  }
  return true;
}

inline bool is_dense(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  return has_no_overlap(sizes, strides, true);
}

inline std::vector<int64_t> strides_of(const Tensor& t) {
  return std::vector<int64_t>(t.strides().begin(), t.strides().end());
}

// Whether two tensors, each from its first element to its last, have bytes in common.
inline bool overlap(const Tensor& a, const Tensor& b) {
  const auto extent = [](const Tensor& t) {
    int64_t elements = t.numel() == 0 ? 0 : 1;
    for (int64_t i = 0; elements > 0 && i < t.dim(); ++i) elements += (t.size(i) - 1) * t.stride(i);
    const ScalarType type = t.scalar_type();
    const int64_t each = type == ScalarType::Long ? 8 : bytes_of(element_of(type));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    return std::pair<uintptr_t, uintptr_t>(begin, begin + elements * each);
  };
  const auto [a_begin, a_end] = extent(a);
  const auto [b_begin, b_end] = extent(b);
  return a_begin < b_end && b_begin < a_end;
}

// The strides of `like` where it is dense, else contiguous, as torch's empty_like has it.
inline std::vector<int64_t> dense_strides(const Tensor& like) {
  const std::vector<int64_t> sizes = sizes_of(like);
  std::vector<int64_t> strides = strides_of(like);
  return is_dense(sizes, strides) ? strides : contiguous_strides(sizes);
}

// The strides of a (C), (N, C) or (N, C, d1, ...) tensor seen as (batch, class, position); nothing
// where d1, ... do not step through memory as one.
inline std::optional<Strides> view_strides(const Tensor& t) {
  const int64_t dim = t.dim();
  if (dim == 1) return Strides{0, t.stride(0), 0};
  Strides view{t.stride(0), t.stride(1), 0};
  int64_t run = -1;  // positions from the inner dimensions on, once one was met
  for (int64_t i = dim - 1; i >= 2; --i) {
    if (t.size(i) == 1) continue;
    if (run < 0) {
      view.position = t.stride(i);
      run = t.size(i);
    } else if (t.stride(i) == view.position * run) {
      run *= t.size(i);
    } else {
      return std::nullopt;
    }
  }
  return view;
}

// A gradient has the layout of its tensor, where kernels can write that.
inline std::vector<int64_t> gradient_strides(const Tensor& like) {
  return view_strides(like) ? dense_strides(like) : contiguous_strides(sizes_of(like));
}

// Asking costs a tenth of the dispatcher's way to the same answer.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

struct View {
  Tensor tensor;
  Strides strides;
};

inline View viewed(const Tensor& t) {
  const std::optional<Strides> strides = view_strides(t);
  if (strides) return {t, *strides};
  const Tensor copy = as_contiguous(t);
  return {copy, *view_strides(copy)};
}

// ---- one call ----

// The options of a call, in the order of the ops' schemas; their types also stand in
// register_cross_entropy.
struct CrossEntropyOptions {
  std::optional<Tensor> weight;
  int64_t ignore_index = -100;
  double label_smoothing = 0;
  int64_t reduction = kSum;
  ScalarType loss_dtype = ScalarType::Float;
  double lse_square_scale = 0;
};

// The arguments that every op shares, checked, and the params that follow from them. Params is a
// CrossEntropyProblem and whatever its kernels need besides.
template <class Params>
struct CrossEntropyCall {
  Params p{};
  Place place;
  Reduction reduction;
  ScalarType accumulate;
  double smoothing;                // label_smoothing; 0 where it is off
  std::vector<int64_t> row_sizes;  // of the unreduced loss
  int64_t rows = 0;
  // What p points into.
  Tensor logits, target;
  std::optional<Tensor> weight;

  CrossEntropyCall(const Tensor& logits_in, const Tensor& target_in,
                   const CrossEntropyOptions& options)
      : place(place_of(logits_in)), logits(logits_in), target(target_in), weight(options.weight) {
    check_place({&target});
    if (weight) check_place({&*weight});
    check(logits.dim() >= 1, "logits must have a class dimension");
    check(options.reduction >= kNone && options.reduction <= kSum, "reduction must be 0, 1 or 2");
    check(!(options.label_smoothing > 1.0), "label_smoothing must be at most 1");
    reduction = static_cast<Reduction>(options.reduction);
    accumulate = accumulate_type(logits.scalar_type());
    p.logits_type = element_of(logits.scalar_type());
    p.ignore_index = options.ignore_index;
    smoothing = options.label_smoothing > 0 ? options.label_smoothing : 0;  // as torch: NaN is off

    const int64_t dim = logits.dim();
    p.batch = dim == 1 ? 1 : logits.size(0);
    p.classes = logits.size(dim == 1 ? 0 : 1);
    p.positions = 1;
    if (dim > 1) row_sizes.push_back(p.batch);
    for (int64_t i = 2; i < dim; ++i) {
      p.positions *= logits.size(i);
      row_sizes.push_back(logits.size(i));
    }
    rows = p.batch * p.positions;

    const View logits_view = viewed(logits);
    logits = logits_view.tensor;
    p.logits = logits.const_data_ptr();
    p.logits_strides = logits_view.strides;

    p.keep = 1.0 - smoothing;
    p.uniform = p.classes > 0 ? smoothing / static_cast<double>(p.classes) : 0.0;
    p.constants = {1.0, smoothing, options.lse_square_scale};
    if (weight) {
      check(weight->dim() == 1 && weight->size(0) == p.classes, "weight must have shape (C)");
      check(weight->scalar_type() == accumulate,
            "weight must be float32, or float64 where logits are");
      weight = as_contiguous(*weight);
    }
    if (target.scalar_type() == ScalarType::Long) {
      set_labels();
    } else {
      set_probabilities();
    }
  }

  void check_place(std::initializer_list<const Tensor*> tensors) const {
    for (const Tensor* tensor : tensors)
      check(place_of(*tensor) == place, "every tensor must be on the same device");
  }

  void set_labels() {
    check(target.dim() == static_cast<int64_t>(row_sizes.size()),
          "target must have shape (N, ...)");
    for (size_t i = 0; i < row_sizes.size(); ++i)
      check(target.size(i) == row_sizes[i], "target must have the shape of logits without classes");
    target = as_contiguous(target);
    p.labels = static_cast<const int64_t*>(target.const_data_ptr());
  }

  void set_probabilities() {
    check(same_sizes(logits, target), "probabilities must have the shape of logits");
    check(target.scalar_type() == logits.scalar_type() || target.scalar_type() == accumulate,
          "probabilities must have the type of logits, or float32 with half precision logits");
    View view = viewed(target);
    // The rows kernel steps through both tensors class by class: one layout for both.
    if (p.logits_strides.cls == 1 && view.strides.cls != 1) {
      Tensor copy =
          empty_strided(sizes_of(logits), dense_strides(logits), target.scalar_type(), place);
      torch::stable::copy_(copy, target);
      view = viewed(copy);
    }
    target = view.tensor;
    p.probabilities = target.const_data_ptr();
    p.target_type = element_of(target.scalar_type());
    p.target_strides = view.strides;
  }

  Tensor empty_rows() const {
    return empty_strided(row_sizes, contiguous_strides(row_sizes), accumulate, place);
  }

  Tensor empty_gradient() const {
    return empty_strided(sizes_of(logits), gradient_strides(logits), logits.scalar_type(), place);
  }

  void set_gradient(const Tensor& grad) {
    const std::optional<Strides> strides = view_strides(grad);
    check(strides.has_value(), "a gradient keeps the layout of its tensor");
    p.grad = grad.mutable_data_ptr();
    p.grad_strides = *strides;
  }

  void check_largest(const std::optional<Tensor>& largest_mass) const {
    if (!largest_mass) return;
    check_place({&*largest_mass});
    check(largest_mass->numel() == 1 && largest_mass->scalar_type() == ScalarType::Float,
          "largest_mass must be one float32");
  }

  // Rows evenly spaced in every tensor are all batch: no division finds a row.
  void merge_positions() {
    const auto even = [&](const Strides& s) { return s.batch == s.position * p.positions; };
    if (p.positions == 1 || !even(p.logits_strides) ||
        (p.probabilities != nullptr && !even(p.target_strides)) ||
        (p.grad != nullptr && !even(p.grad_strides))) {
      return;
    }
    for (Strides* strides : {&p.logits_strides, &p.target_strides, &p.grad_strides})
      strides->batch = strides->position;
    p.batch = rows;
    p.positions = 1;
  }

  bool contiguous_classes() const {
    return p.logits_strides.cls == 1 && (p.probabilities == nullptr || p.target_strides.cls == 1) &&
           (p.grad == nullptr || p.grad_strides.cls == 1);
  }
};

// ---- the ops ----
//
// A back end is a struct Call, a CrossEntropyCall of its own Params, that knows how to
//   Tensor empty_gradient()
//   Tensor unit(const std::optional<Tensor>& largest_mass)   of the gradient, which is set
//   Tensor loss(ScalarType)              run, the loss as torch would return it
//   static void scale(const CrossEntropyCall<CrossEntropyProblem>&, const Tensor& factor, bool
//   smoothed)

template <class Call, class... Option>
struct CrossEntropyLosses {
  static Tensor forward(Tensor logits, Tensor target, Option... option) {
    const CrossEntropyOptions options{option...};
    return Call(logits, target, options).loss(options.loss_dtype);
  }

  static std::tuple<Tensor, Tensor, Tensor> forward_backward(Tensor logits, Tensor target,
                                                             Option... option,
                                                             std::optional<Tensor> largest_mass) {
    const CrossEntropyOptions options{option...};
    Call call(logits, target, options);
    const Tensor grad_logits = call.empty_gradient();
    const auto [loss, unit] = with_gradient(call, options, largest_mass, grad_logits);
    return {loss, grad_logits, unit};
  }

  static std::tuple<Tensor, Tensor> forward_backward_out(Tensor logits, Tensor target,
                                                         Option... option,
                                                         std::optional<Tensor> largest_mass,
                                                         Tensor grad_logits) {
    const CrossEntropyOptions options{option...};
    Call call(logits, target, options);
    call.check_place({&grad_logits});
    check(same_sizes(grad_logits, logits) && grad_logits.scalar_type() == logits.scalar_type(),
          "grad_logits must have the shape and the type of logits");
    check(has_no_overlap(sizes_of(grad_logits), strides_of(grad_logits)),
          "grad_logits must have memory of its own for every element");
    const bool in_place = grad_logits.const_data_ptr() == logits.const_data_ptr() &&
                          strides_of(grad_logits) == strides_of(logits);
    check((in_place || !overlap(grad_logits, logits)) && !overlap(grad_logits, target) &&
              !(options.weight && overlap(grad_logits, *options.weight)),
          "grad_logits must be the logits, or share no memory with what is read");
    return with_gradient(call, options, largest_mass, grad_logits);
  }

 private:
  static std::tuple<Tensor, Tensor> with_gradient(Call& call, const CrossEntropyOptions& options,
                                                  const std::optional<Tensor>& largest_mass,
                                                  const Tensor& grad_logits) {
    call.check_largest(largest_mass);
    call.set_gradient(grad_logits);
    const Tensor unit = call.unit(largest_mass);
    return {call.loss(options.loss_dtype), unit};
  }
};

template <class Call>
void cross_entropy_scale(Tensor grad_logits, Tensor factor, Tensor target, int64_t ignore_index,
                         bool smoothed) {
  check(is_dense(sizes_of(grad_logits), strides_of(grad_logits)),
        "grad_logits must be dense, as the ops return it");
  check(grad_logits.dim() == 0 || view_strides(grad_logits),
        "grad_logits must have a layout of the ops' own");
  CrossEntropyOptions options;
  options.ignore_index = ignore_index;
  CrossEntropyCall<CrossEntropyProblem> call(grad_logits, target, options);
  call.check_place({&factor});
  check(factor.numel() == 1 || factor.numel() == call.rows,
        "factor must be one number, or one for each row");
  element_of(factor.scalar_type());
  if (grad_logits.numel() == 0) return;
  call.set_gradient(grad_logits);
  Call::scale(call, factor, smoothed);
}

template <class Call, class Library>
void register_cross_entropy(Library& library) {
  using Losses =
      CrossEntropyLosses<Call, std::optional<Tensor>, int64_t, double, int64_t, ScalarType, double>;
  library.impl("cross_entropy_forward", TORCH_BOX(&Losses::forward));
  library.impl("cross_entropy_forward_backward", TORCH_BOX(&Losses::forward_backward));
  library.impl("cross_entropy_forward_backward_out", TORCH_BOX(&Losses::forward_backward_out));
  library.impl("cross_entropy_scale_", TORCH_BOX(&cross_entropy_scale<Call>));
}

}  // namespace fastopt

// Which labels count, and whether all of them are in range.
#include "params.h"
#include "rules/target.h"

namespace fastopt {
namespace FASTOPT_LEVEL {

LabelCount cross_entropy_count_labels(const int64_t* labels, int64_t count, int64_t classes,
                                      int64_t ignore_index) {
  int64_t valid = 0, out_of_range = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t used = labels[i] != ignore_index;
    valid += used;
    out_of_range += used & !in_range(labels[i], classes);
  }
  return {valid, out_of_range};
}

}  // namespace FASTOPT_LEVEL
}  // namespace fastopt

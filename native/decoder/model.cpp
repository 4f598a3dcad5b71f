#include "decoder/model.hpp"

#include <algorithm>
#include <stdexcept>

#include "core/checked.hpp"

namespace matquant {

Model::Model(std::int64_t hidden_, std::int64_t heads_, std::int64_t kv_heads_, std::int64_t head_dim_,
             std::int64_t vocab_)
    : hidden(in_range(hidden_, MOST_VALUES, "hidden is out of range")),
      heads(in_range(heads_, MOST_HEADS, "heads are out of range")),
      kv_heads(in_range(kv_heads_, MOST_HEADS, "kv_heads are out of range")),
      head_dim(in_range(head_dim_, MOST_HEAD_DIM, "head_dim is out of range")),
      vocab(in_range(vocab_, MOST_VALUES, "vocab is out of range")) {
  if (heads % kv_heads || head_dim % 2) throw std::invalid_argument("the sizes do not make a model");
  in_range(heads_ * head_dim_, MOST_VALUES, "heads x head_dim is out of range");
}

int Model::add(const Matrix& matrix) {
  matrices.push_back(matrix);
  if (matrix.nested) activation_group = std::min(activation_group, matquant::activation_group(*matrix.nested));
  return static_cast<int>(matrices.size()) - 1;
}

}  // namespace matquant

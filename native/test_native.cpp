// The native tests, without Python: for sanitizers (make test-sanitize) and other machines (make test-neon).
//
// Products are compared with the definition of a nested weight in plain loops: for every instruction set of the
// machine, width, rule, grid and mode, and a table of shapes, groups, batches and numbers of threads. Buffers have
// exactly the size they need. Decode steps of a small model must not allocate after the first ones.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "core/team.hpp"
#include "decoder/step.hpp"
#include "kernels/kernels.hpp"
#include "test_columns.hpp"
#include "test_fixture.hpp"

using namespace matquant;

// Calls of malloc and related functions in this process, including those by operator new and the C++ library.
static std::atomic<long> allocations{0};

#ifdef __SANITIZE_ADDRESS__
// From <sanitizer/allocator_interface.h>, which not every compiler has.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, std::size_t),
                                                         void (*)(const volatile void*));
static void count_allocation(const volatile void*, std::size_t) { ++allocations; }
static void ignore_free(const volatile void*) {}
static const int counting = __sanitizer_install_malloc_and_free_hooks(count_allocation, ignore_free);
#elif defined(__GLIBC__)
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void* malloc(std::size_t bytes) { return ++allocations, __libc_malloc(bytes); }
void* calloc(std::size_t count, std::size_t bytes) { return ++allocations, __libc_calloc(count, bytes); }
void* realloc(void* at, std::size_t bytes) { return ++allocations, __libc_realloc(at, bytes); }
void* memalign(std::size_t line, std::size_t bytes) { return ++allocations, __libc_memalign(line, bytes); }
void* aligned_alloc(std::size_t line, std::size_t bytes) { return ++allocations, __libc_memalign(line, bytes); }
int posix_memalign(void** at, std::size_t line, std::size_t bytes) {
  *at = (++allocations, __libc_memalign(line, bytes));
  return *at ? 0 : ENOMEM;
}
}
static const int counting = 1;
#else
static const int counting = 0;
#endif

namespace {

int failures = 0;
void expect(bool holds, const char* what, const Fixture& of, int bits, const char* isa) {
  if (holds) return;
  if (++failures < 20)
    std::printf("FAILED %s: %s, %d bits, rule %d, grid %d, [%d, %d], groups of %d, %d tokens\n", what, isa, bits,
                static_cast<int>(of.rule), static_cast<int>(of.linear.grid), of.shape.rows, of.shape.cols,
                of.shape.group, of.shape.tokens);
}

std::vector<float> product(const Fixture& of, int bits, Activations activations, int threads) {
  const std::size_t bytes = input_bytes(of.shape.tokens, of.shape.cols, activations);
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(64, bytes), &std::free);
  const Input input =
      make_input(workspace.get(), of.shape.tokens, of.shape.cols, activations, activation_group(of.linear));
  for (int thread = 0; thread < threads; ++thread) prepare(input, of.x.data(), thread, threads);
  std::vector<float> y(static_cast<std::size_t>(of.shape.tokens) * of.shape.rows, NAN);
  for (int thread = 0; thread < threads; ++thread)
    linear(of.linear, bits, input, y.data(), of.shape.rows, thread, threads);
  return y;
}

// True if y is the product within 16 units of 2^-24 sum |x| |w|; the weights of another width or grid must not pass.
bool is_product(const std::vector<float>& y, const Fixture& of, int bits, Grid grid, Activations activations) {
  const Case& shape = of.shape;
  const double step = 1 << (8 - bits), centre = of.rule == Rule::prefix ? (step - 1) / 2 : 0.0;
  for (int token = 0; token < shape.tokens; ++token) {
    std::vector<double> seen(shape.cols);
    const int group = shape.group <= 64 ? 64 : 128;  // of activations
    for (int first = 0; first < shape.cols; first += group) {
      const int stop = std::min(first + group, shape.cols);
      const float* x = &of.x[static_cast<std::size_t>(token) * shape.cols];
      float largest = 0.0f;
      for (int i = first; i < stop; ++i) largest = std::fmax(largest, std::fabs(x[i]));
      for (int i = first; i < stop; ++i)
        seen[i] = activations == Activations::exact || largest == 0.0f
                      ? x[i]
                      : static_cast<double>(largest / 127.0f) * std::nearbyint(x[i] * (127.0f / largest));
    }
    for (int row = 0; row < shape.rows; ++row) {
      double sum = 0.0, magnitude = 0.0;
      for (int col = 0; col < shape.cols; ++col) {
        const std::size_t at = static_cast<std::size_t>(row) * (shape.cols / shape.group) + col / shape.group;
        const int code = slice(of.codes[static_cast<std::size_t>(row) * shape.cols + col], bits, of.rule);
        const double weight = of.scale[at] * step * (position(code, bits, grid) - (of.zero[at] - centre) / step);
        sum += seen[col] * weight;
        // a zero-point far from the middle of the codes adds a large term that cancels
        magnitude += std::fabs(seen[col]) * (std::fabs(weight) + of.scale[at] * 128);
      }
      if (!(std::fabs(y[static_cast<std::size_t>(token) * shape.rows + row] - sum) <= 16 * 0x1p-24 * magnitude))
        return false;
    }
  }
  return true;
}

void check(Fixture& of, int bits, const char* isa) {
  of.pack_for(bits, 1 + static_cast<int>(draw() % 3));
  std::vector<std::uint8_t> codes(of.codes.size());
  kernels().codes(of.linear, width_of(bits, of.rule), codes.data());
  bool same = true;
  for (std::size_t i = 0; i < codes.size(); ++i) same = same && codes[i] == slice(of.codes[i], bits, of.rule);
  expect(same, "codes", of, bits, isa);
  for (const Activations activations : {Activations::int8, Activations::exact}) {
    const std::vector<float> y = product(of, bits, activations, 1);
    const Grid grid = of.linear.grid, other = grid == Grid::uniform ? Grid::companded : Grid::uniform;
    expect(is_product(y, of, bits, grid, activations), "product", of, bits, isa);
    if (of.shape.cols >= 64) {
      expect(!is_product(y, of, bits == 8 ? 7 : bits + 1, grid, activations), "neighbour", of, bits, isa);
      if (of.rule == Rule::prefix) expect(!is_product(y, of, bits, other, activations), "other grid", of, bits, isa);
    }
    const std::vector<float> shared = product(of, bits, activations, 3);
    expect(std::memcmp(y.data(), shared.data(), y.size() * sizeof(float)) == 0, "threads", of, bits, isa);
  }
}

// ------------------------------------------------------------------------------------------------------ decode steps

// Two layers with every width: 4 query heads that share 2 key/value heads, a gated block in the first layer, experts
// and a shared one in the second, which has sinks too, clamped gates and a nested head.
struct Decoder {
  static constexpr int HIDDEN = 64, FFN = 160, HEADS = 4, KV = 2, DIM = 32, VOCAB = 96, CAPACITY = 64;
  static constexpr int EXPERTS = 6, ACTIVE = 2, EXPERT = 48;
  std::vector<std::unique_ptr<Fixture>> held;
  std::vector<float> ones = std::vector<float>(FFN, 1.0f), frequencies = std::vector<float>(DIM / 2, 0.1f);
  std::vector<float> router = std::vector<float>(EXPERTS * HIDDEN);
  Model model{HIDDEN, HEADS, KV, DIM, VOCAB};

  // Returns the id of a new matrix.
  int nested(int rows, int cols) {
    held.push_back(std::make_unique<Fixture>(Case{rows, cols, cols, 1}, Rule::prefix));
    Fixture& of = *held.back();
    of.pack_for(8, 1);
    for (std::size_t i = 0; i < of.values.size(); ++i)  // zero-points in the middle: tokens differ
      of.values[i] = i / BLOCK_ROWS % 2 == 0 ? of.values[i] / 64.0f : 128.0f;
    for (int bits = 1; bits <= 8; ++bits) {
      const float step = static_cast<float>(1 << (8 - bits));
      of.linear.affine[bits] = {of.values.data(), false, step, (step - 1) / 2, false, 0.0f};
    }
    Matrix matrix;
    matrix.nested = &of.linear;
    return model.add(matrix);
  }

  Gated gated(int width) { return {nested(width, HIDDEN), nested(width, HIDDEN), nested(HIDDEN, width)}; }

  Experts experts() {
    for (float& value : router) value = draw_float();
    Matrix matrix;
    matrix.dense = {router.data(), DType::f32, EXPERTS, HIDDEN};
    Experts made;
    made.router = model.add(matrix);
    made.active = ACTIVE;
    for (int i = 0; i < EXPERTS; ++i) made.each.push_back(gated(EXPERT));
    made.shared = gated(FFN);
    made.shared_gate = nested(1, HIDDEN);
    return made;
  }

  Decoder() {
    model.norm_eps = 1e-5f, model.attention_scale = 0.2f, model.embedding_scale = 1.0f;
    model.gate_alpha = 1.7f, model.gate_limit = 7.0f;
    model.ropes.push_back({frequencies.data(), 1.0f});
    for (int i = 0; i < 2; ++i) {
      Layer layer{};
      Attention& attention = layer.attention;
      attention.query = nested(HEADS * DIM, HIDDEN);
      attention.key = nested(KV * DIM, HIDDEN);
      attention.value = nested(KV * DIM, HIDDEN);
      attention.output = nested(HIDDEN, HEADS * DIM);
      FeedForward& ffn = layer.feed_forward;
      if (i == 0)
        ffn.gated = gated(FFN);
      else
        ffn.experts = experts(), attention.sinks = ones.data();
      attention.norm = ffn.norm = ones.data();
      model.layers.push_back(layer);
    }
    model.embedding = nested(VOCAB, HIDDEN);
    model.head = nested(VOCAB, HIDDEN);
    model.norm = ones.data();
  }
};

// Sizes whose products overflow 32 or 64 bits are rejected; they must not wrap around to small ones.
template <class Make>
void expect_rejected(const char* what, Make make) {
  try {
    make();
  } catch (const std::invalid_argument&) {
    return;
  } catch (const std::bad_alloc&) {
    return;
  }
  ++failures;
  std::printf("FAILED: %s is accepted\n", what);
}

void check_sizes() {
  constexpr std::int64_t huge = std::int64_t{1} << 32;
  expect_rejected("heads x head_dim of 2^32 + 128", [] { Model(64, 2, 1, (huge + 128) / 2, 96); });
  expect_rejected("2^31 heads", [] { Model(64, huge / 2, 1, 32, 96); });
  expect_rejected("a vocabulary of 2^31", [] { Model(64, 4, 2, 32, huge / 2); });
  expect_rejected("a negative size", [] { Model(-64, 4, 2, 32, 96); });
  Model wide(64, 1, 1, MOST_HEAD_DIM, 96);
  expect_rejected("a cache of a model without layers", [&] { Cache(wide, 16, DType::f32); });
  wide.layers.resize(1 << 12);
  expect_rejected("a cache of 2^70 bytes", [&] { Cache(wide, MOST_CAPACITY, DType::f32); });
  expect_rejected("a cache of 2^31 tokens", [&] { Cache(wide, 0x7FFFFFFF, DType::f32); });
  expect_rejected("a workspace of 2^31 tokens", [&] { Workspace(wide, 0x7FFFFFFF, 64, 1); });
  expect_rejected("a workspace of 2^31 threads", [&] { Workspace(wide, 16, 64, 0x7FFFFFFF); });
}

// Every mode, number of threads and width, and widths that change by matrix and by step: a prompt and the first few
// tokens may allocate, later tokens must not.
int check_steps() {
  const Decoder decoder;
  const std::size_t matrices = decoder.model.matrices.size();
  std::vector<float> logits(Decoder::VOCAB);
  int steps = 0;
  for (const Activations activations : {Activations::int8, Activations::exact})
    for (const int threads : {1, 2}) {
      const Cache cache(decoder.model, Decoder::CAPACITY, activations == Activations::exact ? DType::f32 : DType::f16);
      Workspace workspace(decoder.model, 16, Decoder::CAPACITY, threads);
      std::vector<std::uint8_t> bits(matrices);
      std::vector<Row> rows;
      for (int t = 0; t < 16; ++t) rows.push_back({t, t, &cache});
      for (int position = 0; position < Decoder::CAPACITY; position += static_cast<int>(rows.size())) {
        if (position == 16) rows.resize(1);
        for (std::size_t i = 0; i < matrices; ++i)  // widths 1 to 8 in turn, then a plan
          bits[i] = static_cast<std::uint8_t>(1 + (position < 40 ? position : position + i) % 8);
        for (std::size_t t = 0; t < rows.size(); ++t) rows[t].position = position + static_cast<int>(t);
        const long before = allocations;
        step(decoder.model, bits.data(), activations, rows.data(), static_cast<int>(rows.size()),
             static_cast<int>(rows.size()) - 1, logits.data(), workspace);
        if (position < 18) continue;
        ++steps;
        if (allocations == before && std::isfinite(logits[0])) continue;
        ++failures;
        std::printf("FAILED step: %ld allocations at position %d, %d threads\n", allocations - before, position,
                    threads);
      }
    }
  return steps;
}

// A prompt at once, with rows grouped by expert, gives the logits of one token at a time bit for bit; and several
// experts are used.
void check_grouping() {
  const Decoder decoder;
  const std::vector<std::uint8_t> bits(decoder.model.matrices.size(), 4);
  constexpr int TOKENS = 16;
  for (const Activations activations : {Activations::int8, Activations::exact})
    for (const int threads : {1, 2, 3}) {
      std::vector<float> logits[2];
      bool used[Decoder::EXPERTS] = {};
      for (const int at_once : {1, TOKENS}) {
        const Cache cache(decoder.model, TOKENS, activations == Activations::exact ? DType::f32 : DType::f16);
        Workspace workspace(decoder.model, TOKENS, TOKENS, threads);
        std::vector<float>& found = logits[at_once > 1];
        found.resize(TOKENS * Decoder::VOCAB);
        for (int first = 0; first < TOKENS; first += at_once) {
          std::vector<Row> rows;
          for (int t = 0; t < at_once; ++t) rows.push_back({(first + t) * 5 % Decoder::VOCAB, first + t, &cache});
          step(decoder.model, bits.data(), activations, rows.data(), at_once, 0,
               found.data() + first * Decoder::VOCAB, workspace);
          for (int i = 0; i < at_once * Decoder::ACTIVE; ++i) used[workspace.chosen[i]] = true;
        }
      }
      const bool same = std::memcmp(logits[0].data(), logits[1].data(), logits[0].size() * sizeof(float)) == 0;
      if (same && std::count(used, used + Decoder::EXPERTS, true) > 2) continue;
      ++failures;
      std::printf("FAILED: rows grouped by expert, %d threads\n", threads);
    }
}

// Of rows without logits the last layer computes keys and values only: the other rows and the next token have the same
// logits bit for bit, and the experts of that layer are used for rows with logits only.
void check_rows_without_logits() {
  const Decoder decoder;
  const std::vector<std::uint8_t> bits(decoder.model.matrices.size(), 4);
  constexpr int TOKENS = 9, VOCAB = Decoder::VOCAB;
  for (const Activations activations : {Activations::int8, Activations::exact})
    for (const int threads : {1, 2, 3}) {
      std::vector<float> all;
      for (const int first_logit : {0, 1, 5, TOKENS - 1, TOKENS}) {
        const Cache cache(decoder.model, LANES, activations == Activations::exact ? DType::f32 : DType::f16);
        Workspace workspace(decoder.model, TOKENS, LANES, threads);
        std::vector<Row> rows;
        for (int t = 0; t <= TOKENS; ++t) rows.push_back({t * 5 % VOCAB, t, &cache});
        std::vector<float> logits((TOKENS + 1) * VOCAB);
        step(decoder.model, bits.data(), activations, rows.data(), TOKENS, first_logit,
             logits.data() + first_logit * VOCAB, workspace);
        const std::size_t counts = workspace.all_experts * WIDTH_COUNTS;
        const bool used = std::accumulate(workspace.used, workspace.used + counts, 0u) ==
                          static_cast<unsigned>((TOKENS - first_logit) * Decoder::ACTIVE);
        step(decoder.model, bits.data(), activations, rows.data() + TOKENS, 1, 0, logits.data() + TOKENS * VOCAB,
             workspace);
        if (first_logit == 0) all = logits;
        if (used && std::equal(logits.begin() + first_logit * VOCAB, logits.end(), all.begin() + first_logit * VOCAB))
          continue;
        ++failures;
        std::printf("FAILED: logits from row %d on, %d threads\n", first_logit, threads);
      }
    }
}

// Experts that a token does not use are not read: with all of their scales NaN its logits are the same.
void check_unused_experts() {
  Decoder decoder;
  const std::vector<std::uint8_t> bits(decoder.model.matrices.size(), 4);
  const Cache cache(decoder.model, LANES, DType::f16);
  Workspace workspace(decoder.model, 1, LANES, 1);
  const Row row{5, 0, &cache};
  std::vector<float> logits[2] = {std::vector<float>(Decoder::VOCAB), std::vector<float>(Decoder::VOCAB)};
  step(decoder.model, bits.data(), Activations::int8, &row, 1, 0, logits[0].data(), workspace);
  const Experts& experts = decoder.model.layers[1].feed_forward.experts;
  for (int e = 0; e < Decoder::EXPERTS; ++e) {
    if (std::count(workspace.chosen, workspace.chosen + Decoder::ACTIVE, e) > 0) continue;
    for (const int id : {experts.each[e].gate, experts.each[e].up, experts.each[e].down})
      for (const std::unique_ptr<Fixture>& held : decoder.held)
        if (&held->linear == decoder.model.matrices[id].nested)
          std::fill(held->values.begin(), held->values.end(), NAN);
  }
  step(decoder.model, bits.data(), Activations::int8, &row, 1, 0, logits[1].data(), workspace);
  if (std::isfinite(logits[1][0]) && logits[0] == logits[1]) return;
  ++failures;
  std::printf("FAILED: an expert that is not used changes the logits\n");
}

}  // namespace

int main() {
  check_sizes();
  check_grouping();
  check_rows_without_logits();
  check_unused_experts();
  if (const int wrong = wrong_columns()) ++failures, std::printf("FAILED: %d codes of nested GPTQ are not the best\n", wrong);
  if (counting) {
    const long before = allocations;
    delete new std::atomic<int>(0);
    if (allocations == before) ++failures, std::printf("FAILED: allocations are not counted\n");
    std::printf("decode steps: %d checked for allocations\n", check_steps());
  }
  const Case cases[] = {{1, 1, 1, 1},     {16, 32, 32, 2},   {17, 33, 33, 1},   {15, 300, 300, 3}, {50, 257, 257, 9},
                        {33, 128, 32, 1}, {20, 256, 128, 4}, {18, 96, 16, 5},   {16, 130, 13, 2},  {70, 64, 64, 20},
                        {16, 48, 48, 130}, {33, 160, 32, 17},  {66, 288, 48, 12}, {17, 320, 64, 40}, {15, 200, 200, 33}};
  const std::vector<std::string> sets = isas();
  for (const std::string& name : sets) {
    const char* const isa = name.c_str();
    use_kernels(isa);
    for (const Case& shape : cases)
      for (const Rule rule : {Rule::prefix, Rule::round, Rule::extra})
        for (int bits = 1; bits <= 8; ++bits) {
          Fixture of(shape, rule);
          check(of, bits, isa);
          if (rule != Rule::prefix) continue;
          Fixture bent(shape, rule, Grid::companded);
          check(bent, bits, isa);
        }
    std::printf("%s: checked\n", isa);
  }
  std::printf("%d instruction sets, %d failures\n", static_cast<int>(sets.size()), failures);
  return failures == 0 && !sets.empty() ? 0 : 1;
}

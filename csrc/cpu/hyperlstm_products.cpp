// Single-precision matrix products of the HyperLSTM on CPUs with AVX-512 or AVX2.
//
// The recurrent weights meet a few rows at every step of a sequence. A library packs them anew each
// time, and the one torch comes with leaves half of the vector width unused on many CPUs; here they
// are packed once a sequence. Blocked as usual (Goto and van de Geijn 2008): panels of kColumns
// columns of b, panels of kRows rows of a, a tile of their product held in registers. The order of
// the sums depends on the sizes alone.
#include "isa.h"
#include "memory.h"

namespace sketchfast {
namespace products_cpu {

// A matrix whose element (i, j) is data[i * row + j * column]; one of the two strides is 1.
struct Matrix {
  const float* data;
  int64_t row, column;
};
struct Sizes {
  int64_t m, n, k;
};

// Left factors: rows as they lie in memory, or packed into panels [k][rows] for all of k.
struct Left {
  const float* data;
  int64_t row;  // stride of rows
  bool packed;
};

// What one instruction set offers. A panel is packed for all of k; `part` is spare memory of a
// thread.
struct Kernels {
  int64_t rows, columns;  // of a tile
  int64_t part_floats;
  void (*pack_rows)(const Matrix& a, int64_t first_row, int64_t last_row, int64_t first_k,
                    int64_t last_k, float* to);
  void (*pack_columns)(const Matrix& b, const Sizes&, int64_t panel, int64_t first_k,
                       int64_t last_k, float* to);
  // out[:, panels] (+)= a times column panels [first, last) of b; `packed` null: of `b`.
  void (*multiply_panels)(const Left& a, const Matrix& b, const float* packed, const Sizes&,
                          float* out, int64_t out_row, bool add, int64_t first, int64_t last,
                          float* part);
  // out[rows] (+)= a[rows] times packed b.
  void (*multiply_rows)(const Matrix& a, const float* packed, const Sizes&, float* out,
                        int64_t out_row, bool add, int64_t first_row, int64_t last_row,
                        float* part);
};

#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif
extern const Kernels baseline_kernels;

inline namespace SKETCHFAST_ISA {

using V = FloatV;
constexpr int kWidth = kLanes<float>;
#if defined(SKETCHFAST_ISA_avx512)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 3;  // of a tile's columns
constexpr int kColumns = kVectors * kWidth;
constexpr int64_t kDepth = 192;     // of k at a time: a panel of b then stays in the first cache
constexpr int64_t kRowBlock = 128;  // of rows at a time: their part of `out` stays in the second

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Steps of k at a time: equal parts of at most kDepth.
SKETCHFAST_INLINE int64_t depth_of(int64_t k) {
  const int64_t parts = (k + kDepth - 1) / kDepth;
  return parts ? (k + parts - 1) / parts : 1;
}

// `rows` rows of kWidth steps of k from `from`, as [k][stride].
template <int rows>
SKETCHFAST_INLINE void pack_block(const float* from, int64_t row, float* to, int64_t stride) {
  V block[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) block[i] = i < rows ? load<V>(from + i * row) : V{};
  transpose(block);
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) std::memcpy(to + i * stride, &block[i], rows * sizeof(float));
}

// Rows [first_row, last_row) as panels [k][kRows], zero beyond the last row.
void pack_rows(const Matrix& a, int64_t first_row, int64_t last_row, int64_t first_k,
               int64_t last_k, float* to) {
  for (int64_t row = first_row; row < last_row; row += kRows) {
    const int64_t count = last_row - row < kRows ? last_row - row : kRows;
    const float* from = a.data + row * a.row;
    if (count < kRows) fill(to, (last_k - first_k) * kRows, 0.0f);
    if (a.row == 1 && count == kRows) {
      for (int64_t k = first_k; k < last_k; ++k)
        std::memcpy(to + (k - first_k) * kRows, from + k * a.column, kRows * sizeof(float));
    } else {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t k = first_k; k < last_k; ++k)
          to[(k - first_k) * kRows + i] = from[i * a.row + k * a.column];
    }
    to += (last_k - first_k) * kRows;
  }
}

// Steps [first_k, last_k) of a column panel as [k][kColumns], zero beyond the last column.
void pack_columns(const Matrix& b, const Sizes& sizes, int64_t panel, int64_t first_k,
                  int64_t last_k, float* to) {
  const int64_t column = panel * kColumns;
  const int64_t count = sizes.n - column < kColumns ? sizes.n - column : kColumns;
  const float* from = b.data + column * b.column + first_k * b.row;
  const int64_t steps = last_k - first_k;
  if (count < kColumns) fill(to, steps * kColumns, 0.0f);
  if (b.column == 1 && count == kColumns) {
    for (int64_t k = 0; k < steps; ++k)
      std::memcpy(to + k * kColumns, from + k * b.row, kColumns * sizeof(float));
    return;
  }
  int64_t whole = 0;  // columns that whole blocks of transposes have served
  if (b.row == 1 && b.column != 1) {
    const int64_t blocks = steps / kWidth * kWidth;
    for (; whole + kWidth <= count; whole += kWidth) {
      for (int64_t k = 0; k < blocks; k += kWidth)
        pack_block<kWidth>(from + whole * b.column + k, b.column, to + k * kColumns + whole,
                           kColumns);
      for (int64_t k = blocks; k < steps; ++k)
        for (int64_t j = whole; j < whole + kWidth; ++j)
          to[k * kColumns + j] = from[j * b.column + k];
    }
  }
  for (int64_t k = 0; k < steps; ++k)
    for (int64_t j = whole; j < count; ++j) to[k * kColumns + j] = from[j * b.column + k * b.row];
}

// `rows` of a tile: out (+)= rows of a times a panel of b, over `depth` steps of k.
template <int rows, bool packed>
void tile(const float* __restrict a, int64_t a_row, const float* __restrict b, int64_t depth,
          float* out, int64_t out_row, int64_t columns, bool add) {
  V sum[rows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V from_b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) from_b[v] = load<V>(b + k * kColumns + v * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const V from_a = V{} + (packed ? a[k * kRows + i] : a[i * a_row + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] += from_a * from_b[v];
    }
  }
  for (int i = 0; i < rows; ++i) {
    float* to = out + i * out_row;
    if (columns == kColumns) {
      for (int v = 0; v < kVectors; ++v) {
        V value = sum[i][v];
        if (add) value += load<V>(to + v * kWidth);
        store(to + v * kWidth, value);
      }
    } else {
      float part[kColumns];
      std::memcpy(part, sum[i], sizeof(part));
      for (int64_t j = 0; j < columns; ++j) to[j] = add ? to[j] + part[j] : part[j];
    }
  }
}

template <bool packed>
SKETCHFAST_INLINE void tiles(int64_t rows, const float* a, int64_t a_row, const float* b,
                             int64_t depth, float* out, int64_t out_row, int64_t columns,
                             bool add) {
  const int64_t next = packed ? 1 : a_row;
  if (rows >= kRows) return tile<kRows, packed>(a, a_row, b, depth, out, out_row, columns, add);
  if (rows >= 4 && kRows > 4) {
    tile<4, packed>(a, a_row, b, depth, out, out_row, columns, add);
    a += 4 * next, out += 4 * out_row, rows -= 4;
  }
  if (rows >= 2) {
    tile<2, packed>(a, a_row, b, depth, out, out_row, columns, add);
    a += 2 * next, out += 2 * out_row, rows -= 2;
  }
  if (rows >= 1) tile<1, packed>(a, a_row, b, depth, out, out_row, columns, add);
}

void multiply_panels(const Left& a, const Matrix& b, const float* packed, const Sizes& sizes,
                     float* out, int64_t out_row, bool add, int64_t first, int64_t last,
                     float* part) {
  const int64_t depth = depth_of(sizes.k);
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t column = panel * kColumns;
    const int64_t columns = sizes.n - column < kColumns ? sizes.n - column : kColumns;
    for (int64_t k = 0; k < sizes.k || k == 0; k += depth) {
      const int64_t steps = sizes.k - k < depth ? sizes.k - k : depth;
      const float* from_b = packed ? packed + (panel * sizes.k + k) * kColumns : part;
      if (!packed) pack_columns(b, sizes, panel, k, k + steps, part);
      for (int64_t row = 0; row < sizes.m; row += kRows) {
        float* to = out + row * out_row + column;
        if (!a.packed)
          tiles<false>(sizes.m - row, a.data + row * a.row + k, a.row, from_b, steps, to, out_row,
                       columns, add || k > 0);
        else
          tiles<true>(sizes.m - row, a.data + row * sizes.k + k * kRows, 0, from_b, steps, to,
                      out_row, columns, add || k > 0);
      }
    }
  }
}

void multiply_rows(const Matrix& a, const float* packed, const Sizes& sizes, float* out,
                   int64_t out_row, bool add, int64_t first_row, int64_t last_row, float* part) {
  const int64_t depth = depth_of(sizes.k), panels = (sizes.n + kColumns - 1) / kColumns;
  const bool direct = a.column == 1;
  for (int64_t start = first_row; start < last_row; start += kRowBlock) {
    const int64_t end = start + kRowBlock < last_row ? start + kRowBlock : last_row;
    for (int64_t k = 0; k < sizes.k || k == 0; k += depth) {
      const int64_t steps = sizes.k - k < depth ? sizes.k - k : depth;
      if (!direct) pack_rows(a, start, end, k, k + steps, part);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = panel * kColumns;
        const int64_t columns = sizes.n - column < kColumns ? sizes.n - column : kColumns;
        const float* from_b = packed + (panel * sizes.k + k) * kColumns;
        for (int64_t row = start; row < end; row += kRows) {
          float* to = out + row * out_row + column;
          if (direct)
            tiles<false>(end - row, a.data + row * a.row + k, a.row, from_b, steps, to, out_row,
                         columns, add || k > 0);
          else
            tiles<true>(end - row, part + (row - start) * steps, 0, from_b, steps, to, out_row,
                        columns, add || k > 0);
        }
      }
    }
  }
}

}  // namespace SKETCHFAST_ISA

extern const Kernels SKETCHFAST_KERNELS_OF(SKETCHFAST_ISA) = {
    kRows,        kColumns,     (kRowBlock > kColumns ? kRowBlock : kColumns) * kDepth,
    pack_rows,    pack_columns, multiply_panels,
    multiply_rows};

}  // namespace products_cpu
}  // namespace sketchfast

// --- torch -------------------------------------------------------------------------------------

#if defined(SKETCHFAST_ISA_baseline)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../check.h"

namespace sketchfast {
namespace products_cpu {
namespace {

using torch::stable::new_empty;

constexpr int64_t kLeastWork = 1 << 18;    // multiplications worth a thread of their own
constexpr int64_t kLeastFloats = 1 << 15;  // floats to pack worth a thread of their own
constexpr int64_t kMostShared = 512;  // rows up to which threads share columns rather than rows

const Kernels& kernels(){SKETCHFAST_RETURN_KERNELS_OF_CHOSEN_ISA}

int64_t panels_of(int64_t count, int64_t width) {
  return (count + width - 1) / width;
}

// The last two dimensions of `tensor`; a third before them counts groups.
int64_t groups_of(const char* name, const Tensor& tensor) {
  check(tensor.dim() == 2 || tensor.dim() == 3, name, " must have 2 or 3 dimensions, got shape ",
        shape_of(tensor));
  check(tensor.scalar_type() == ScalarType::Float, name, " must be float32, got scalar type ",
        static_cast<int>(tensor.scalar_type()));
  return tensor.dim() == 3 ? tensor.size(0) : 1;
}

Matrix matrix_of(const char* name, const Tensor& tensor, int64_t group) {
  const int64_t d = tensor.dim();
  Matrix matrix{static_cast<const float*>(tensor.const_data_ptr()), tensor.stride(d - 2),
                tensor.stride(d - 1)};
  // a dimension of size 1 may have any stride
  if (tensor.size(d - 1) == 1) matrix.column = 1;
  if (tensor.size(d - 2) == 1 && matrix.column != 1) matrix.row = 1;
  check(matrix.row == 1 || matrix.column == 1, name, " must be contiguous in one dimension");
  if (d == 3) matrix.data += group * tensor.stride(0);
  return matrix;
}

// b [K, N] or [G, K, N] as panels, float32 [G, panels, K, columns].
Tensor pack(const Tensor& b) {
  const int64_t groups = groups_of("b", b), d = b.dim();
  const Sizes sizes{0, b.size(d - 1), b.size(d - 2)};
  const int64_t panels = panels_of(sizes.n, kernels().columns);
  Tensor packed = new_empty(b, {groups, panels, sizes.k, kernels().columns});
  float* to = static_cast<float*>(packed.mutable_data_ptr());
  const int64_t floats = sizes.k * kernels().columns;
  const int64_t grain = std::max<int64_t>(1, kLeastFloats / std::max<int64_t>(1, floats));
  torch::stable::parallel_for(0, groups * panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels().pack_columns(matrix_of("b", b, i / panels), sizes, i % panels, 0, sizes.k,
                             to + i * floats);
  });
  return packed;
}

Tensor hyperlstm_pack(Tensor b) { return pack(b); }

struct Output {
  float* data;
  int64_t row, group;
};

float* floats_of(const Tensor& tensor) {
  return static_cast<float*>(const_cast<void*>(tensor.const_data_ptr()));
}

// Threads share the rows; b is packed.
void by_rows(const Tensor& a, const Tensor& packed, const Tensor& like, const Sizes& sizes,
             int64_t groups, const Output& to, bool add) {
  const Kernels& k = kernels();
  const int64_t blocks = panels_of(sizes.m, k.rows);
  const int64_t floats = panels_of(sizes.n, k.columns) * sizes.k * k.columns;
  const int64_t grain =
      std::max<int64_t>(1, kLeastWork / std::max<int64_t>(1, k.rows * sizes.n * sizes.k));
  for (int64_t g = 0; g < groups; ++g) {
    const Matrix from_a = matrix_of("a", a, g);
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      const Tensor part = new_empty(like, {k.part_floats});
      k.multiply_rows(from_a, floats_of(packed) + g * floats, sizes, to.data + g * to.group, to.row,
                      add, begin * k.rows, std::min(end * k.rows, sizes.m), floats_of(part));
    });
  }
}

// a's panels, for all of k and every group.
Tensor pack_left(const Tensor& a, const Tensor& like, const Sizes& sizes, int64_t groups) {
  const Kernels& k = kernels();
  const int64_t panels = panels_of(sizes.m, k.rows), floats = k.rows * sizes.k;
  Tensor packed = new_empty(like, {groups * panels * floats});
  const int64_t grain = std::max<int64_t>(1, kLeastFloats / std::max<int64_t>(1, floats));
  torch::stable::parallel_for(0, groups * panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % panels * k.rows;
      k.pack_rows(matrix_of("a", a, i / panels), first, std::min(first + k.rows, sizes.m), 0,
                  sizes.k, floats_of(packed) + i * floats);
    }
  });
  return packed;
}

// Threads share the columns of all groups.
void by_columns(const Tensor& a, const Tensor& b, bool packed, const Tensor& like,
                const Sizes& sizes, int64_t groups, const Output& to, bool add) {
  const Kernels& k = kernels();
  const bool direct = matrix_of("a", a, 0).column == 1;
  const Tensor left = direct ? a : pack_left(a, like, sizes, groups);
  const int64_t left_floats = panels_of(sizes.m, k.rows) * k.rows * sizes.k;
  const int64_t panels = panels_of(sizes.n, k.columns), floats = panels * sizes.k * k.columns;
  const int64_t grain =
      std::max<int64_t>(1, kLeastWork / std::max<int64_t>(1, k.columns * sizes.m * sizes.k));
  torch::stable::parallel_for(0, groups * panels, grain, [&](int64_t begin, int64_t end) {
    const Tensor part = new_empty(like, {packed ? 0 : k.part_floats});
    for (int64_t i = begin; i < end;) {
      const int64_t g = i / panels, first = i % panels, last = std::min(panels, first + end - i);
      const Matrix from_a = matrix_of("a", a, g);
      const Left from_left = direct ? Left{from_a.data, from_a.row, false}
                                    : Left{floats_of(left) + g * left_floats, 0, true};
      k.multiply_panels(from_left, packed ? Matrix{} : matrix_of("b", b, g),
                        packed ? floats_of(b) + g * floats : nullptr, sizes, to.data + g * to.group,
                        to.row, add, first, last, floats_of(part));
      i += last - first;
    }
  });
}

// out [M, N] or [G, M, N] (+)= a b, where b [.., K, N] is packed by hyperlstm_pack, or not.
void hyperlstm_product(Tensor a, Tensor b, Tensor out, bool packed, bool add) {
  const int64_t groups = groups_of("out", out), d = out.dim();
  check(groups_of("a", a) == groups && a.dim() == d, "a must have as many groups as out, got ",
        shape_of(a), " and ", shape_of(out));
  const Sizes sizes{out.size(d - 2), out.size(d - 1), a.size(d - 1)};
  const Kernels& k = kernels();
  const int64_t panels = panels_of(sizes.n, k.columns);
  check(a.size(d - 2) == sizes.m, "a must have as many rows as out, got ", shape_of(a), " and ",
        shape_of(out));
  check(out.stride(d - 1) == 1 || sizes.n <= 1, "out's last dimension must be contiguous");
  if (packed) {
    check_tensor("b", b, ScalarType::Float, {groups, panels, sizes.k, k.columns});
  } else {
    check(groups_of("b", b) == groups && b.dim() == d && b.size(d - 2) == sizes.k &&
              b.size(d - 1) == sizes.n,
          "b must have shape [.., ", sizes.k, ", ", sizes.n, "], got ", shape_of(b));
  }
  if (groups * sizes.m * sizes.n == 0) return;
  const Output to{static_cast<float*>(out.mutable_data_ptr()), out.stride(d - 2),
                  d == 3 ? out.stride(0) : 0};
  if (sizes.m > kMostShared)
    by_rows(a, packed ? b : pack(b), out, sizes, groups, to, add);
  else
    by_columns(a, b, packed, out, sizes, groups, to, add);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sketchfast, CPU, library) {
  library.impl("hyperlstm_pack_native", TORCH_BOX(&hyperlstm_pack));
  library.impl("hyperlstm_product_native", TORCH_BOX(&hyperlstm_product));
}

}  // namespace products_cpu
}  // namespace sketchfast

#endif  // SKETCHFAST_ISA_baseline

// Stroke rasterization on the CPU: one sketch a thread, everything of a sketch in its cache.
//
// The canvas is cut into columns of tiles one vector wide. Each segment is clipped once to a tile
// column and visits only the rows within reach of it ("splat"); a byte a (tile, row) says that
// something is near
// ("hot"), and ink, blur, loss and their backward run over hot vectors and their neighbours alone,
// so that background costs nothing. Backward finds the nearest segments again, which is cheaper
// than storing them, and each segment then gathers from the pixels it won.
#include <algorithm>
#include <cstdlib>
#include <new>

#include "../raster_math.h"
#include "elements.h"
#include "isa.h"

namespace sketchfast {
namespace raster_cpu {

// The strokes of a batch, and how they become ink.
struct Strokes {
  const void* points;  // [B, T, 2]
  Dtype dtype;
  const bool* pen_down;    // [B, T]
  const int64_t* lengths;  // [B] or null
  int64_t steps;
};
struct Canvas {
  int64_t height, width;
  double sharpness, offset;
  double blur_sigma;  // 0: none
  int64_t blur_taps;
};
struct Loss {
  Strokes target_strokes;  // points null: `target` is given
  const void* target;      // [B, H, W] in the compute type
  void* value;             // [B]
  void* grad_points;       // [B, T, 2] in the compute type, or null
};

// What one instruction set offers; rows begin..end of the batch.
struct Kernels {
  void (*forward)(const Strokes&, const Canvas&, void* image, Dtype image_dtype, int64_t begin,
                  int64_t end);
  void (*backward)(const Strokes&, const Canvas&, const void* grad, Dtype grad_dtype,
                   void* grad_points, int64_t begin, int64_t end);
  void (*cross_entropy)(const Strokes&, const Canvas&, const Loss&, int64_t begin, int64_t end);
  void (*distance_forward)(const Strokes&, const Canvas&, void* distance2, int32_t* segment,
                           int64_t begin, int64_t end);
  void (*distance_backward)(const Strokes&, const Canvas&, const void* grad, const int32_t* segment,
                            void* grad_points, int64_t begin, int64_t end);
};
extern const Kernels baseline_kernels, avx2_kernels, avx512_kernels;

inline namespace SKETCHFAST_ISA {

using raster::Gap;
using raster::Segment;
using raster::SegmentGrad;

inline int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// --- scratch -----------------------------------------------------------------------------------

// A grow-only array of plain values that starts out as `fill`; its users restore that.
template <typename T>
struct Array {
  T* data = nullptr;
  int64_t size = 0;

  T* reserve(int64_t count, T fill) {
    if (count > size) {
      std::free(data);
      const int64_t bytes = (count * sizeof(T) + 63) / 64 * 64;
      data = static_cast<T*>(std::aligned_alloc(64, bytes));
      size = data ? count : 0;
      if (!data) throw std::bad_alloc();
      for (int64_t i = 0; i < count; ++i) data[i] = fill;
    }
    return data;
  }
  ~Array() { std::free(data); }
};

// Sizes that all passes over one canvas share.
template <typename real>
struct Grid {
  static constexpr int lanes = kLanes<real>;
  int64_t height, width, tiles;
  int64_t radius;          // of the blur, 0 for none
  int64_t spread;          // tiles the blur reaches to either side
  int64_t margin, stride;  // of a padded plane: lanes before the first tile, values a row

  Grid(const Canvas& canvas)
      : height(canvas.height),
        width(canvas.width),
        tiles((canvas.width + lanes - 1) / lanes),
        radius(canvas.blur_sigma > 0 ? canvas.blur_taps / 2 : 0),
        spread((radius + lanes - 1) / lanes),
        margin(spread * lanes),
        stride(tiles * lanes + 2 * margin) {}

  int64_t valid(int64_t tile) const { return std::min<int64_t>(lanes, width - tile * lanes); }
  int64_t at(int64_t tile, int64_t row) const { return (tile * height + row) * lanes; }
  int64_t padded(int64_t tile, int64_t row) const { return row * stride + margin + tile * lanes; }
};

// One byte a (tile, row), tile by tile.
struct Flags {
  Array<uint8_t> bytes;
  int64_t height = 0;

  void clear(int64_t tiles, int64_t rows) {
    height = rows;
    std::memset(bytes.reserve(tiles * rows, 0), 0, tiles * rows);
  }
  void copy(const Flags& from, int64_t tiles) {
    height = from.height;
    std::memcpy(bytes.reserve(tiles * height, 0), from.bytes.data, tiles * height);
  }
  uint8_t* column(int64_t tile) { return bytes.data + tile * height; }
  const uint8_t* column(int64_t tile) const { return bytes.data + tile * height; }
};

// The strokes of one sketch and what is nearest to each pixel.
template <typename real>
struct Field {
  using Index = typename Simd<real>::Index;
  Array<Segment<real>> segments;  // those that exist and come near the canvas
  Array<int32_t> number;          // which segment of the sketch each is
  int64_t count = 0;
  real reach = 0;
  Array<real> best;  // [tiles, H, lanes], infinite between sketches
  Array<Index> won;  // [tiles, H, lanes], an index into `segments`; read where hot
  Flags hot;
};

template <typename real>
struct Scratch {
  Field<real> drawn, target;
  Array<real> plane;                // [H, stride] padded, zero between uses: what a blur reads
  Array<real> column;               // [H + 2 radius, lanes], zero between uses
  Array<real> weights;              // [taps]
  Array<real> image, target_image;  // [tiles, H, lanes] blurred ink; read where `lit`
  Array<real> coefficient;          // [tiles, H, lanes] d loss / d d2; read where hot
  Array<double> grad;               // [T, 2]
  Flags lit, target_lit, near;
};

template <typename real>
Scratch<real>& scratch() {
  static thread_local Scratch<real> instance;
  return instance;
}

// --- strokes to distance field -----------------------------------------------------------------

inline bool finite(double x) { return x - x == 0; }

struct Point {
  double x, y;
};

inline Point point_at(const Strokes& strokes, int64_t b, int64_t t) {
  const int64_t i = 2 * (b * strokes.steps + t);
  return {element(strokes.points, strokes.dtype, i), element(strokes.points, strokes.dtype, i + 1)};
}

inline int64_t length_of(const Strokes& strokes, int64_t b) {
  if (!strokes.lengths) return strokes.steps;
  return std::min(std::max<int64_t>(strokes.lengths[b], 0), strokes.steps);
}

// Calls visit(t, start, end) for every segment of sketch b that exists.
template <typename Visit>
void for_each_segment(const Strokes& strokes, int64_t b, Visit visit) {
  const int64_t length = length_of(strokes, b);
  if (length < 2) return;
  const bool* pen_down = strokes.pen_down + b * strokes.steps;
  Point start = point_at(strokes, b, 0);
  for (int64_t t = 0; t + 1 < length; ++t) {
    const Point end = point_at(strokes, b, t + 1);
    if (pen_down[t] && finite(start.x) && finite(start.y) && finite(end.x) && finite(end.y))
      visit(t, start, end);
    start = end;
  }
}

template <typename real>
void collect_segments(Field<real>& field, const Strokes& strokes, const Canvas& canvas, int64_t b,
                      double cutoff) {
  const double reach = raster::reach(canvas.sharpness, canvas.offset, cutoff);
  field.segments.reserve(strokes.steps, {});
  field.number.reserve(strokes.steps, 0);
  field.count = 0;
  field.reach = real(reach);
  if (reach < 0) return;
  const double x1 = canvas.width - 1 + reach, y1 = canvas.height - 1 + reach;
  for_each_segment(strokes, b, [&](int64_t t, Point start, Point end) {
    Segment<real>* out = field.segments.data + field.count;
    if (raster::clip(start.x, start.y, end.x, end.y, -reach, -reach, x1, y1, out))
      field.number.data[field.count++] = int32_t(t);
  });
}

struct Span {
  int64_t first, last;  // inclusive; empty where last < first
};

// A little more than the reach, so that rounding here never drops a pixel.
template <typename real>
real loose(real reach) {
  return reach * real(1.0001) + real(0.01);
}

template <typename real>
SKETCHFAST_INLINE Span tiles_of(const Segment<real>& s, real reach, const Grid<real>& grid) {
  const real end = s.x + s.dx, r = loose(reach);
  const real left = std::min(s.x, end) - r, right = std::max(s.x, end) + r;
  if (right < 0 || left > real(grid.width - 1)) return {0, -1};
  const int64_t first = left > 0 ? int64_t(left) / grid.lanes : 0;
  const int64_t last = right < real(grid.width) ? int64_t(right) / grid.lanes : grid.tiles - 1;
  return {first, last};
}

// A segment that spans fewer rows is not worth clipping to each of its columns.
constexpr int kSteep = 4;

// The rows of one tile column within reach of the part of the segment that is within reach of the
// column.
template <typename real>
SKETCHFAST_INLINE Span rows_of(const Segment<real>& s, real inverse_dx, real reach, int64_t tile,
                               const Grid<real>& grid) {
  const real r = loose(reach);
  real first = 0, last = 1;
  if (inverse_dx != 0) {
    const real left = (real(tile * grid.lanes) - r - s.x) * inverse_dx;
    const real right = (real((tile + 1) * grid.lanes - 1) + r - s.x) * inverse_dx;
    first = std::max(first, std::min(left, right));
    last = std::min(last, std::max(left, right));
    if (first > last) return {0, -1};
  }
  const real y0 = s.y + first * s.dy, y1 = s.y + last * s.dy;
  const real low = std::min(y0, y1) - r, high = std::max(y0, y1) + r;
  const int64_t from = low > 0 ? int64_t(low) : 0;  // a row early costs nothing
  const int64_t to = high < 0 ? -1 : std::min<int64_t>(int64_t(high), grid.height - 1);
  return {from, to};
}

template <typename V, typename real>
SKETCHFAST_INLINE V lane_numbers() {
  V v;
  for (int i = 0; i < kLanes<real>; ++i) v[i] = real(i);
  return v;
}

// Calls visit(tile, rows, from_x): from_x is pixel - start along x for the tile's lanes.
template <typename real, typename Visit>
SKETCHFAST_INLINE void for_each_tile(const Segment<real>& s, real reach, const Grid<real>& grid,
                                     Visit visit) {
  using V = typename Simd<real>::V;
  const Span tiles = tiles_of(s, reach, grid);
  const bool steep = s.dy > kSteep || s.dy < -kSteep;
  const real inverse_dx = steep && s.dx != 0 ? 1 / s.dx : 0;  // 0: take the whole segment's rows
  for (int64_t tile = tiles.first; tile <= tiles.last; ++tile) {
    const Span rows = rows_of(s, inverse_dx, reach, tile, grid);
    if (rows.last < rows.first) continue;
    visit(tile, rows, lane_numbers<V, real>() + (real(tile * grid.lanes) - s.x));
  }
}

// Fills best, won and hot. Strict comparison in order of segments: the lowest index wins a tie.
template <typename real>
void splat(Field<real>& field, const Grid<real>& grid) {
  using V = typename Simd<real>::V;
  using I = typename Simd<real>::I;
  field.best.reserve(grid.tiles * grid.height * grid.lanes, real(__builtin_inf()));
  field.won.reserve(grid.tiles * grid.height * grid.lanes, 0);
  field.hot.clear(grid.tiles, grid.height);
  for (int64_t i = 0; i < field.count; ++i) {
    const Segment<real> s = field.segments.data[i];
    const I index = I{} + typename Simd<real>::Index(i);
    for_each_tile(s, field.reach, grid, [&](int64_t tile, Span rows, V from_x) {
      std::memset(field.hot.column(tile) + rows.first, 1, rows.last - rows.first + 1);
      real* best = field.best.data + grid.at(tile, rows.first);
      auto* won = field.won.data + grid.at(tile, rows.first);
      for (int64_t row = rows.first; row <= rows.last; ++row) {
        const V distance2 =
            raster::squared_length(raster::gap_to(s, from_x, V{} + (real(row) - s.y)));
        const V old = load<V>(best);
        const auto better = distance2 < old;
        store(best, select(better, distance2, old));
        store(won, select(better, index, load<I>(won)));
        best += grid.lanes;
        won += grid.lanes;
      }
    });
  }
}

template <typename real>
void draw(Field<real>& field, const Strokes& strokes, const Canvas& canvas, const Grid<real>& grid,
          int64_t b, double cutoff) {
  collect_segments(field, strokes, canvas, b, cutoff);
  splat(field, grid);
}

// Calls visit(tile, row) for every flagged vector, run of rows by run of rows.
template <typename real, typename Visit>
SKETCHFAST_INLINE void for_each_flagged(const Flags& flags, const Grid<real>& grid, Visit visit) {
  const int64_t tiles = grid.tiles, height = grid.height;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const uint8_t* column = flags.column(tile);
    int64_t row = 0;
    while (row < height) {
      const void* found = std::memchr(column + row, 1, height - row);
      if (!found) break;
      row = static_cast<const uint8_t*>(found) - column;
      for (; row < height && column[row]; ++row) visit(tile, row);
    }
  }
}

// The lanes of a tile that lie on the canvas keep their value, the others become 0.
template <typename real, typename V>
SKETCHFAST_INLINE V on_canvas(V value, int64_t tile, const Grid<real>& grid) {
  return select(lane_numbers<V, real>() < V{} + real(grid.valid(tile)), value, V{});
}

// The ink of a hot vector; `best` is restored behind it.
template <typename real>
SKETCHFAST_INLINE typename Simd<real>::V take_ink(Field<real>& field, const Canvas& canvas,
                                                  const Grid<real>& grid, int64_t tile,
                                                  int64_t row) {
  using V = typename Simd<real>::V;
  real* best = field.best.data + grid.at(tile, row);
  const V ink = raster::ink_at(load<V>(best), real(canvas.sharpness), real(canvas.offset));
  store(best, V{} + real(__builtin_inf()));
  return on_canvas(ink, tile, grid);
}

// --- blur --------------------------------------------------------------------------------------

template <typename real>
void set_weights(Array<real>& weights, const Canvas& canvas) {
  weights.reserve(canvas.blur_taps, 0);
  double sum = 0;
  const auto weight = [&](int64_t i) {
    const double position = double(i - canvas.blur_taps / 2) / canvas.blur_sigma;
    return __builtin_exp(-0.5 * position * position);
  };
  for (int64_t i = 0; i < canvas.blur_taps; ++i) sum += weight(i);
  for (int64_t i = 0; i < canvas.blur_taps; ++i) weights.data[i] = real(weight(i) / sum);
}

// into[row] |= from[row - radius .. row + radius]
inline void spread_rows(uint8_t* into, const uint8_t* from, int64_t height, int64_t radius) {
  for (int64_t shift = -radius; shift <= radius; ++shift) {
    const int64_t first = std::max<int64_t>(0, -shift), last = std::min(height, height - shift);
    for (int64_t row = first; row < last; ++row) into[row] |= from[row + shift];
  }
}

// What a blur of `from` can touch.
template <typename real>
void dilate(Flags& into, const Flags& from, const Grid<real>& grid) {
  into.clear(grid.tiles, grid.height);
  for (int64_t tile = 0; tile < grid.tiles; ++tile)
    for (int64_t other = std::max<int64_t>(0, tile - grid.spread);
         other <= std::min(grid.tiles - 1, tile + grid.spread); ++other)
      spread_rows(into.column(tile), from.column(other), grid.height, grid.radius);
}

template <typename V, typename real, int taps>
SKETCHFAST_INLINE V weighted_sum(const real* weights, int64_t count, const real* from,
                                 int64_t step) {
  V sum = weights[0] * load<V>(from);
  if constexpr (taps > 0) {
#pragma GCC unroll 8
    for (int k = 1; k < taps; ++k) sum += weights[k] * load<V>(from + k * step);
  } else {
    for (int64_t k = 1; k < count; ++k) sum += weights[k] * load<V>(from + k * step);
  }
  return sum;
}

// Calls emit(tile, row, blurred) for the vectors of `wanted`. The plane holds values where `filled`
// and zeros elsewhere, and is zeroed again.
template <int taps, typename real, typename Emit>
void blur_taps(Scratch<real>& work, const Flags& filled, const Flags& wanted, const Canvas& canvas,
               const Grid<real>& grid, Emit emit) {
  using V = typename Simd<real>::V;
  const real* weights = work.weights.data;
  const int64_t count = canvas.blur_taps, radius = grid.radius, lanes = grid.lanes;
  real* column = work.column.reserve((grid.height + 2 * radius) * lanes, 0);
  for (int64_t tile = 0; tile < grid.tiles; ++tile) {
    const int64_t low = std::max<int64_t>(0, tile - grid.spread);
    const int64_t high = std::min(grid.tiles - 1, tile + grid.spread);
    const auto any = [&](int64_t row) {
      uint8_t flag = 0;
      for (int64_t other = low; other <= high; ++other) flag |= filled.column(other)[row];
      return flag;
    };
    int64_t first = grid.height, last = -1;
    for (int64_t row = 0; row < grid.height; ++row) {
      if (!any(row)) continue;
      const V sum = weighted_sum<V, real, taps>(
          weights, count, work.plane.data + grid.padded(tile, row) - radius, 1);
      store(column + (row + radius) * lanes, sum);
      first = std::min(first, row);
      last = row;
    }
    if (last < 0) continue;
    const uint8_t* wants = wanted.column(tile);
    const int64_t from = std::max<int64_t>(0, first - radius);
    const int64_t to = std::min(grid.height - 1, last + radius);
    for (int64_t row = from; row <= to; ++row)
      if (wants[row])
        emit(tile, row, weighted_sum<V, real, taps>(weights, count, column + row * lanes, lanes));
    std::memset(column + (first + radius) * lanes, 0, (last - first + 1) * lanes * sizeof(real));
  }
  for_each_flagged(filled, grid, [&](int64_t tile, int64_t row) {
    store(work.plane.data + grid.padded(tile, row), V{});
  });
}

template <typename real, typename Emit>
void blur(Scratch<real>& work, const Flags& filled, const Flags& wanted, const Canvas& canvas,
          const Grid<real>& grid, Emit emit) {
  if (canvas.blur_taps == 5)
    blur_taps<5>(work, filled, wanted, canvas, grid, emit);
  else
    blur_taps<0>(work, filled, wanted, canvas, grid, emit);
}

template <typename real>
real* padded_plane(Scratch<real>& work, const Grid<real>& grid) {
  return work.plane.reserve(grid.height * grid.stride, 0);
}

// Calls emit(tile, row, ink) for every vector with (blurred) ink, which are those of `lit` on
// return. keep_ink(tile, row, ink) sees the ink before the blur.
template <typename real, typename Keep, typename Emit>
void emit_image(Scratch<real>& work, Field<real>& field, Flags& lit, const Canvas& canvas,
                const Grid<real>& grid, Keep keep_ink, Emit emit) {
  if (grid.radius == 0) {
    lit.copy(field.hot, grid.tiles);
    for_each_flagged(field.hot, grid, [&](int64_t tile, int64_t row) {
      const auto ink = take_ink(field, canvas, grid, tile, row);
      keep_ink(tile, row, ink);
      emit(tile, row, ink);
    });
    return;
  }
  real* plane = padded_plane(work, grid);
  for_each_flagged(field.hot, grid, [&](int64_t tile, int64_t row) {
    const auto ink = take_ink(field, canvas, grid, tile, row);
    keep_ink(tile, row, ink);
    store(plane + grid.padded(tile, row), ink);
  });
  dilate(lit, field.hot, grid);
  blur(work, field.hot, lit, canvas, grid, emit);
}

struct KeepNothing {
  template <typename... T>
  SKETCHFAST_INLINE void operator()(T...) const {}
};

// --- image -------------------------------------------------------------------------------------

template <typename real>
void forward_one(const Strokes& strokes, const Canvas& canvas, void* image, Dtype dtype,
                 int64_t b) {
  using V = typename Simd<real>::V;
  const Grid<real> grid(canvas);
  Scratch<real>& work = scratch<real>();
  if (grid.radius) set_weights(work.weights, canvas);
  const int64_t bytes = element_bytes(dtype), pixels = grid.height * grid.width;
  std::memset(static_cast<char*>(image) + b * pixels * bytes, 0, pixels * bytes);
  draw(work.drawn, strokes, canvas, grid, b, raster::kImageCutoff<real>);
  const auto emit = [&](auto put) {
    emit_image(work, work.drawn, work.lit, canvas, grid, KeepNothing{},
               [&grid, put, b, pixels](int64_t tile, int64_t row, V ink) {
                 put(b * pixels + row * grid.width + tile * grid.lanes, ink, grid.valid(tile));
               });
  };
  if constexpr (sizeof(real) == 4) {
    if (dtype == Dtype::float32) {
      float* to = static_cast<float*>(image);
      return emit([to](int64_t first, V ink, int64_t valid) {
        valid == kLanes<real> ? store(to + first, ink) : store_first(to + first, ink, valid);
      });
    }
  }
  emit([image, dtype](int64_t first, V ink, int64_t valid) {
    real lanes[kLanes<real>];
    store(lanes, ink);
    store_elements(image, dtype, first, lanes, valid);
  });
}

// --- gradient ----------------------------------------------------------------------------------

// Each segment gathers from the hot pixels it won; `coefficient` is d loss / d d2 there.
template <typename real>
void gather_gradient(Scratch<real>& work, const Grid<real>& grid, int64_t steps) {
  using V = typename Simd<real>::V;
  using I = typename Simd<real>::I;
  const Field<real>& field = work.drawn;
  double* grad = work.grad.reserve(2 * steps, 0);
  std::fill(grad, grad + 2 * steps, 0.0);
  for (int64_t i = 0; i < field.count; ++i) {
    const Segment<real> s = field.segments.data[i];
    const I index = I{} + typename Simd<real>::Index(i);
    SegmentGrad<V> sum{};
    for_each_tile(s, field.reach, grid, [&](int64_t tile, Span rows, V from_x) {
      const int64_t at = grid.at(tile, rows.first);
      const real* coefficient = work.coefficient.data + at;
      const auto* won = field.won.data + at;
      for (int64_t row = rows.first; row <= rows.last; ++row) {
        const V mine = select(load<I>(won) == index, load<V>(coefficient), V{});
        const Gap<V> gap = raster::gap_to(s, from_x, V{} + (real(row) - s.y));
        raster::accumulate(&sum, s, raster::refined(s, gap), mine);
        coefficient += grid.lanes;
        won += grid.lanes;
      }
    });
    double* at = grad + 2 * field.number.data[i];
    at[0] += sum_of_lanes(sum.start_x);
    at[1] += sum_of_lanes(sum.start_y);
    at[2] += sum_of_lanes(sum.end_x);
    at[3] += sum_of_lanes(sum.end_y);
  }
}

template <typename real>
void store_gradient(Scratch<real>& work, void* grad_points, Dtype dtype, int64_t steps, int64_t b) {
  store_elements(grad_points, dtype, 2 * b * steps, work.grad.data, 2 * steps);
}

// The ink of every hot vector goes where its coefficient will be.
template <typename real>
auto keep_ink_in_coefficient(Scratch<real>& work, const Grid<real>& grid) {
  real* ink_of = work.coefficient.reserve(grid.tiles * grid.height * grid.lanes, 0);
  return [ink_of, &grid](int64_t tile, int64_t row, auto ink) {
    store(ink_of + grid.at(tile, row), ink);
  };
}

// coefficient = d loss / d d2, from the ink it holds and from d loss / d ink before the blur.
template <typename real, typename V>
SKETCHFAST_INLINE void set_coefficient(Scratch<real>& work, const Canvas& canvas,
                                       const Grid<real>& grid, int64_t tile, int64_t row,
                                       V grad_ink) {
  real* at = work.coefficient.data + grid.at(tile, row);
  store(at, raster::distance2_slope(grad_ink, load<V>(at), real(canvas.sharpness)));
}

template <typename real>
SKETCHFAST_INLINE typename Simd<real>::V load_vector(const void* image, Dtype dtype, int64_t first,
                                                     int64_t valid) {
  using V = typename Simd<real>::V;
  if (valid == kLanes<real> && dtype == (sizeof(real) == 4 ? Dtype::float32 : Dtype::float64))
    return load<V>(static_cast<const real*>(image) + first);
  real lanes[kLanes<real>] = {};
  load_elements(image, dtype, first, lanes, valid);
  return load<V>(lanes);
}

template <typename real>
void backward_one(const Strokes& strokes, const Canvas& canvas, const void* grad, Dtype grad_dtype,
                  void* grad_points, int64_t b) {
  using V = typename Simd<real>::V;
  const Grid<real> grid(canvas);
  Scratch<real>& work = scratch<real>();
  if (grid.radius) set_weights(work.weights, canvas);
  Field<real>& field = work.drawn;
  draw(field, strokes, canvas, grid, b, raster::kImageCutoff<real>);
  const auto keep_ink = keep_ink_in_coefficient(work, grid);
  for_each_flagged(field.hot, grid, [&](int64_t tile, int64_t row) {
    keep_ink(tile, row, take_ink(field, canvas, grid, tile, row));
  });
  const auto grad_at = [&](int64_t tile, int64_t row) {
    const int64_t first = (b * grid.height + row) * grid.width + tile * grid.lanes;
    return load_vector<real>(grad, grad_dtype, first, grid.valid(tile));
  };
  if (grid.radius == 0) {
    for_each_flagged(field.hot, grid, [&](int64_t tile, int64_t row) {
      set_coefficient(work, canvas, grid, tile, row, grad_at(tile, row));
    });
  } else {
    real* plane = padded_plane(work, grid);
    dilate(work.near, field.hot, grid);
    for_each_flagged(work.near, grid, [&](int64_t tile, int64_t row) {
      store(plane + grid.padded(tile, row), grad_at(tile, row));
    });
    blur(work, work.near, field.hot, canvas, grid, [&](int64_t tile, int64_t row, V grad_ink) {
      set_coefficient(work, canvas, grid, tile, row, grad_ink);
    });
  }
  gather_gradient(work, grid, strokes.steps);
  store_gradient(work, grad_points, strokes.dtype, strokes.steps, b);
}

// --- loss --------------------------------------------------------------------------------------

// The (blurred) ink of a field into `image`, zero where not `lit`.
template <typename real, typename Keep>
void image_in_scratch(Scratch<real>& work, Field<real>& field, Flags& lit, Array<real>& image,
                      const Canvas& canvas, const Grid<real>& grid, Keep keep_ink) {
  real* to = image.reserve(grid.tiles * grid.height * grid.lanes, 0);
  emit_image(work, field, lit, canvas, grid, keep_ink,
             [&](int64_t tile, int64_t row, auto ink) { store(to + grid.at(tile, row), ink); });
}

template <typename real>
void cross_entropy_one(const Strokes& strokes, const Canvas& canvas, const Loss& loss, int64_t b) {
  using V = typename Simd<real>::V;
  const Grid<real> grid(canvas);
  Scratch<real>& work = scratch<real>();
  if (grid.radius) set_weights(work.weights, canvas);
  const bool wants_grad = loss.grad_points != nullptr;
  draw(work.drawn, strokes, canvas, grid, b, raster::kLossCutoff<real>);
  image_in_scratch(work, work.drawn, work.lit, work.image, canvas, grid,
                   keep_ink_in_coefficient(work, grid));
  const bool from_strokes = loss.target_strokes.points != nullptr;
  if (from_strokes) {
    draw(work.target, loss.target_strokes, canvas, grid, b, raster::kLossCutoff<real>);
    image_in_scratch(work, work.target, work.target_lit, work.target_image, canvas, grid,
                     KeepNothing{});
  }
  // Where neither is lit every pixel has the same loss, unless an image was given.
  const auto target_at = [&](int64_t tile, int64_t row) {
    if (from_strokes)
      return work.target_lit.column(tile)[row]
                 ? load<V>(work.target_image.data + grid.at(tile, row))
                 : V{};
    const int64_t first = (b * grid.height + row) * grid.width + tile * grid.lanes;
    const Dtype dtype = sizeof(real) == 4 ? Dtype::float32 : Dtype::float64;
    return load_vector<real>(loss.target, dtype, first, grid.valid(tile));
  };
  real* plane = wants_grad && grid.radius ? padded_plane(work, grid) : nullptr;
  const double scale = 1.0 / double(grid.height * grid.width);
  double total = 0;
  for (int64_t tile = 0; tile < grid.tiles; ++tile) {
    const uint8_t* lit = work.lit.column(tile);
    const uint8_t* target_lit = from_strokes ? work.target_lit.column(tile) : nullptr;
    for (int64_t row = 0; row < grid.height; ++row) {
      if (!lit[row] && target_lit && !target_lit[row]) {
        total += grid.valid(tile) * raster::kBlankLoss;
        continue;
      }
      const V p = lit[row] ? load<V>(work.image.data + grid.at(tile, row)) : V{};
      const auto pixel = raster::cross_entropy<V, real>(p, target_at(tile, row));
      total += sum_of_lanes(on_canvas(pixel.value, tile, grid));
      if (!wants_grad || !lit[row]) continue;
      const V slope = on_canvas(pixel.slope, tile, grid) * real(scale);
      if (grid.radius)
        store(plane + grid.padded(tile, row), slope);
      else
        set_coefficient(work, canvas, grid, tile, row, slope);
    }
  }
  static_cast<real*>(loss.value)[b] = real(total * scale);
  if (!wants_grad) return;
  if (grid.radius)
    blur(work, work.lit, work.drawn.hot, canvas, grid, [&](int64_t tile, int64_t row, V grad_ink) {
      set_coefficient(work, canvas, grid, tile, row, grad_ink);
    });
  gather_gradient(work, grid, strokes.steps);
  store_gradient(work, loss.grad_points, sizeof(real) == 4 ? Dtype::float32 : Dtype::float64,
                 strokes.steps, b);
}

// --- distance ----------------------------------------------------------------------------------

// Float32 arithmetic loses the pixel grid where coordinates are far off it; double serves those
// sketches.
constexpr double kFar = 4096;

template <typename compute, typename real>
void distance_one(const Strokes& strokes, const Canvas& canvas, real* distance2, int32_t* segment,
                  int64_t b) {
  using V = typename Simd<compute>::V;
  using I = typename Simd<compute>::I;
  using Index = typename Simd<compute>::Index;
  const Grid<compute> grid(canvas);
  Field<compute>& field = scratch<compute>().drawn;
  const int64_t vectors = grid.tiles * grid.height;
  compute* best = field.best.reserve(vectors * grid.lanes, compute(__builtin_inf()));
  Index* won = field.won.reserve(vectors * grid.lanes, 0);
  std::fill(won, won + vectors * grid.lanes, Index(-1));
  for_each_segment(strokes, b, [&](int64_t t, Point start, Point end) {
    Segment<compute> s{};
    if (!raster::clip(start.x, start.y, end.x, end.y, -__builtin_inf(), -__builtin_inf(),
                      __builtin_inf(), __builtin_inf(), &s))
      return;
    const I index = I{} + Index(t);
    for (int64_t tile = 0; tile < grid.tiles; ++tile) {
      const V from_x = lane_numbers<V, compute>() + (compute(tile * grid.lanes) - s.x);
      for (int64_t row = 0; row < grid.height; ++row) {
        const V d2 = raster::squared_length(raster::gap_to(s, from_x, V{} + (compute(row) - s.y)));
        const int64_t at = grid.at(tile, row);
        const V old = load<V>(best + at);
        store(best + at, select(d2 < old, d2, old));
        store(won + at, select(d2 < old, index, load<I>(won + at)));
      }
    }
  });
  for (int64_t row = 0; row < grid.height; ++row)
    for (int64_t x = 0; x < grid.width; ++x) {
      const int64_t to = (b * grid.height + row) * grid.width + x;
      const int64_t from = grid.at(x / grid.lanes, row) + x % grid.lanes;
      distance2[to] = real(best[from]);
      segment[to] = int32_t(won[from]);
    }
  std::fill(best, best + vectors * grid.lanes, compute(__builtin_inf()));
}

template <typename real>
void distance_backward_one(const Strokes& strokes, const Canvas& canvas, const real* grad,
                           const int32_t* segment, void* grad_points, int64_t b) {
  Scratch<real>& work = scratch<real>();
  double* sum = work.grad.reserve(2 * strokes.steps, 0);
  std::fill(sum, sum + 2 * strokes.steps, 0.0);
  for (int64_t row = 0; row < canvas.height; ++row)
    for (int64_t x = 0; x < canvas.width; ++x) {
      const int64_t at = (b * canvas.height + row) * canvas.width + x;
      const int64_t t = segment[at];
      if (t < 0 || t + 1 >= strokes.steps || grad[at] == 0) continue;
      const Point start = point_at(strokes, b, t), end = point_at(strokes, b, t + 1);
      Segment<double> s{};
      if (!raster::clip(start.x, start.y, end.x, end.y, -__builtin_inf(), -__builtin_inf(),
                        __builtin_inf(), __builtin_inf(), &s))
        continue;
      SegmentGrad<double> one{};
      raster::accumulate(&one, s, raster::gap_to(s, x - s.x, row - s.y), double(grad[at]));
      double* to = sum + 2 * t;
      to[0] += one.start_x;
      to[1] += one.start_y;
      to[2] += one.end_x;
      to[3] += one.end_y;
    }
  store_gradient(work, grad_points, strokes.dtype, strokes.steps, b);
}

// --- entry points ------------------------------------------------------------------------------

// Work on rows begin..end; where memory runs out the scratch starts anew, since planes that must be
// left blank may not be.
template <typename real, typename Work>
void for_each_sketch(int64_t begin, int64_t end, Work work) {
  try {
    for (int64_t b = begin; b < end; ++b) work(b);
  } catch (...) {
    Scratch<real>& spoiled = scratch<real>();
    spoiled.~Scratch<real>();
    new (&spoiled) Scratch<real>();
    throw;
  }
}

void forward(const Strokes& strokes, const Canvas& canvas, void* image, Dtype dtype, int64_t begin,
             int64_t end) {
  const auto run = [&](auto real) {
    for_each_sketch<decltype(real)>(begin, end, [&](int64_t b) {
      forward_one<decltype(real)>(strokes, canvas, image, dtype, b);
    });
  };
  strokes.dtype == Dtype::float64 ? run(double()) : run(float());
}

void backward(const Strokes& strokes, const Canvas& canvas, const void* grad, Dtype grad_dtype,
              void* grad_points, int64_t begin, int64_t end) {
  const auto run = [&](auto real) {
    for_each_sketch<decltype(real)>(begin, end, [&](int64_t b) {
      backward_one<decltype(real)>(strokes, canvas, grad, grad_dtype, grad_points, b);
    });
  };
  strokes.dtype == Dtype::float64 ? run(double()) : run(float());
}

void cross_entropy(const Strokes& strokes, const Canvas& canvas, const Loss& loss, int64_t begin,
                   int64_t end) {
  const auto run = [&](auto real) {
    for_each_sketch<decltype(real)>(begin, end, [&](int64_t b) {
      cross_entropy_one<decltype(real)>(strokes, canvas, loss, b);
    });
  };
  strokes.dtype == Dtype::float64 ? run(double()) : run(float());
}

bool is_far(const Strokes& strokes, int64_t b) {
  bool far = false;
  for_each_segment(strokes, b, [&](int64_t, Point start, Point end) {
    const double largest = std::max(std::max(__builtin_fabs(start.x), __builtin_fabs(start.y)),
                                    std::max(__builtin_fabs(end.x), __builtin_fabs(end.y)));
    far = far || largest > kFar;
  });
  return far;
}

void distance_forward(const Strokes& strokes, const Canvas& canvas, void* distance2,
                      int32_t* segment, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    if (strokes.dtype == Dtype::float64)
      distance_one<double>(strokes, canvas, static_cast<double*>(distance2), segment, b);
    else if (is_far(strokes, b))
      distance_one<double>(strokes, canvas, static_cast<float*>(distance2), segment, b);
    else
      distance_one<float>(strokes, canvas, static_cast<float*>(distance2), segment, b);
  }
}

void distance_backward(const Strokes& strokes, const Canvas& canvas, const void* grad,
                       const int32_t* segment, void* grad_points, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    strokes.dtype == Dtype::float64
        ? distance_backward_one(strokes, canvas, static_cast<const double*>(grad), segment,
                                grad_points, b)
        : distance_backward_one(strokes, canvas, static_cast<const float*>(grad), segment,
                                grad_points, b);
}

}  // namespace SKETCHFAST_ISA

extern const Kernels SKETCHFAST_KERNELS_OF(SKETCHFAST_ISA) = {forward, backward, cross_entropy,
                                                              distance_forward, distance_backward};

}  // namespace raster_cpu
}  // namespace sketchfast

// --- torch -------------------------------------------------------------------------------------

#if defined(SKETCHFAST_ISA_baseline)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../check.h"
#include "dtype_of.h"

namespace sketchfast {
namespace raster_cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

const Kernels& kernels(){SKETCHFAST_RETURN_KERNELS_OF_CHOSEN_ISA}

ScalarType compute_type(const Tensor& points) {
  return points.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Strokes strokes_of(const Tensor& points, const Tensor& pen_down, const OptionalTensor& lengths) {
  check(points.dim() == 3 && points.size(2) == 2, "points must have shape [B, T, 2], got ",
        shape_of(points));
  const int64_t batch = points.size(0), steps = points.size(1);
  check_tensor("points", points, points.scalar_type(), {batch, steps, 2});
  check_tensor("pen_down", pen_down, ScalarType::Bool, {batch, steps});
  if (lengths) check_tensor("lengths", *lengths, ScalarType::Long, {batch});
  return {points.const_data_ptr(), dtype_of("points", points.scalar_type()),
          static_cast<const bool*>(pen_down.const_data_ptr()),
          lengths ? static_cast<const int64_t*>(lengths->const_data_ptr()) : nullptr, steps};
}

Canvas canvas_of(int64_t height, int64_t width, double sharpness, double offset, double sigma,
                 int64_t taps) {
  check(height >= 1 && width >= 1, "size must be at least 1 by 1, got ", height, " by ", width);
  check(taps >= 1 && taps % 2 == 1, "blur_taps must be odd and positive, got ", taps);
  return {height, width, sharpness, offset, sigma, taps};
}

// A chunk is worth waking a thread for: a tenth of a millisecond or so, one sketch at least.
template <typename Work>
void over_batch(const Tensor& points, int64_t pixels, Work work) {
  const int64_t grain =
      std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, pixels + 8 * points.size(1)));
  torch::stable::parallel_for(0, points.size(0), grain, work);
}

std::tuple<Tensor, Tensor> raster_fwd(Tensor points, Tensor pen_down, OptionalTensor lengths,
                                      int64_t height, int64_t width, double sharpness,
                                      double offset, double blur_sigma, int64_t blur_taps,
                                      ScalarType dtype, bool) {
  const Strokes strokes = strokes_of(points, pen_down, lengths);
  const Canvas canvas = canvas_of(height, width, sharpness, offset, blur_sigma, blur_taps);
  const Dtype image_dtype = dtype_of("dtype", dtype);
  Tensor image = torch::stable::new_empty(points, {points.size(0), height, width}, dtype);
  const ScalarType index = strokes.steps <= 32768 ? ScalarType::Short : ScalarType::Int;
  Tensor segment = torch::stable::new_empty(points, {0, height, width}, index);
  void* to = image.mutable_data_ptr();
  over_batch(points, height * width, [&](int64_t begin, int64_t end) {
    kernels().forward(strokes, canvas, to, image_dtype, begin, end);
  });
  return {image, segment};
}

Tensor raster_bwd(Tensor grad, Tensor points, Tensor pen_down, OptionalTensor lengths, Tensor,
                  double sharpness, double offset, double blur_sigma, int64_t blur_taps) {
  const Strokes strokes = strokes_of(points, pen_down, lengths);
  check(grad.dim() == 3, "grad must have shape [B, H, W], got ", shape_of(grad));
  const int64_t height = grad.size(1), width = grad.size(2);
  check_tensor("grad", grad, grad.scalar_type(), {points.size(0), height, width});
  const Canvas canvas = canvas_of(height, width, sharpness, offset, blur_sigma, blur_taps);
  const Dtype grad_dtype = dtype_of("grad", grad.scalar_type());
  Tensor grad_points = torch::stable::new_empty(points, {points.size(0), points.size(1), 2});
  void* to = grad_points.mutable_data_ptr();
  const void* from = grad.const_data_ptr();
  over_batch(points, height * width, [&](int64_t begin, int64_t end) {
    kernels().backward(strokes, canvas, from, grad_dtype, to, begin, end);
  });
  return grad_points;
}

std::tuple<Tensor, Tensor> raster_bce(Tensor points, Tensor pen_down, OptionalTensor lengths,
                                      OptionalTensor target, OptionalTensor target_points,
                                      OptionalTensor target_pen_down, OptionalTensor target_lengths,
                                      int64_t height, int64_t width, double sharpness,
                                      double offset, double blur_sigma, int64_t blur_taps,
                                      bool need_grad) {
  const Strokes strokes = strokes_of(points, pen_down, lengths);
  const Canvas canvas = canvas_of(height, width, sharpness, offset, blur_sigma, blur_taps);
  const int64_t batch = points.size(0);
  const ScalarType type = compute_type(points);
  Loss loss{};
  if (target) {
    check_tensor("target", *target, type, {batch, height, width});
    loss.target = target->const_data_ptr();
  } else {
    check(target_points && target_pen_down, "target must be an image or strokes, got neither");
    check(target_points->size(0) == batch, "target_points must have ", batch, " rows, got ",
          target_points->size(0));
    check_tensor("target_points", *target_points, type, {batch, target_points->size(1), 2});
    loss.target_strokes = strokes_of(*target_points, *target_pen_down, target_lengths);
    // An empty tensor may have no address, and the kernels tell strokes from an image by it.
    if (!loss.target_strokes.points) loss.target_strokes.points = &loss;
  }
  Tensor value = torch::stable::new_empty(points, {batch}, type);
  Tensor grad_points =
      torch::stable::new_empty(points, {need_grad ? batch : 0, points.size(1), 2}, type);
  loss.value = value.mutable_data_ptr();
  loss.grad_points =
      need_grad && grad_points.numel() > 0 ? grad_points.mutable_data_ptr() : nullptr;
  over_batch(points, height * width, [&](int64_t begin, int64_t end) {
    kernels().cross_entropy(strokes, canvas, loss, begin, end);
  });
  return {value, grad_points};
}

std::tuple<Tensor, Tensor> stroke_distance_fwd(Tensor points, Tensor pen_down,
                                               OptionalTensor lengths, int64_t height,
                                               int64_t width) {
  const Strokes strokes = strokes_of(points, pen_down, lengths);
  const Canvas canvas = canvas_of(height, width, 1, 0, 0, 1);
  Tensor distance2 =
      torch::stable::new_empty(points, {points.size(0), height, width}, compute_type(points));
  Tensor segment =
      torch::stable::new_empty(points, {points.size(0), height, width}, ScalarType::Int);
  void* to = distance2.mutable_data_ptr();
  auto* index = static_cast<int32_t*>(segment.mutable_data_ptr());
  over_batch(points, height * width * std::max<int64_t>(1, points.size(1)),
             [&](int64_t begin, int64_t end) {
               kernels().distance_forward(strokes, canvas, to, index, begin, end);
             });
  return {distance2, segment};
}

Tensor stroke_distance_bwd(Tensor grad, Tensor points, Tensor segment) {
  check(points.dim() == 3 && points.size(2) == 2, "points must have shape [B, T, 2], got ",
        shape_of(points));
  check(grad.dim() == 3, "grad must have shape [B, H, W], got ", shape_of(grad));
  const int64_t batch = points.size(0), height = grad.size(1), width = grad.size(2);
  check_tensor("points", points, points.scalar_type(), {batch, points.size(1), 2});
  check_tensor("grad", grad, compute_type(points), {batch, height, width});
  check_tensor("segment", segment, ScalarType::Int, {batch, height, width});
  const Strokes strokes{points.const_data_ptr(), dtype_of("points", points.scalar_type()), nullptr,
                        nullptr, points.size(1)};
  const Canvas canvas = canvas_of(height, width, 1, 0, 0, 1);
  Tensor grad_points = torch::stable::new_empty(points, {batch, points.size(1), 2});
  void* to = grad_points.mutable_data_ptr();
  const void* from = grad.const_data_ptr();
  const auto* index = static_cast<const int32_t*>(segment.const_data_ptr());
  over_batch(points, height * width, [&](int64_t begin, int64_t end) {
    kernels().distance_backward(strokes, canvas, from, index, to, begin, end);
  });
  return grad_points;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sketchfast, CPU, library) {
  library.impl("raster_fwd_native", TORCH_BOX(&raster_fwd));
  library.impl("raster_bwd_native", TORCH_BOX(&raster_bwd));
  library.impl("raster_bce_native", TORCH_BOX(&raster_bce));
  library.impl("stroke_distance_fwd_native", TORCH_BOX(&stroke_distance_fwd));
  library.impl("stroke_distance_bwd_native", TORCH_BOX(&stroke_distance_bwd));
}

}  // namespace raster_cpu
}  // namespace sketchfast

#endif  // SKETCHFAST_ISA_baseline

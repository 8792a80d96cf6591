// CUDA kernels of rasterization: no torch types, so that tests/cuda_emulator compiles this very
// source with a host compiler. raster_launch.h chooses kernels and sizes, raster.cu is the door to
// torch.
//
// One CTA draws one tile of one sketch; a small image is one tile. All planes of a tile lie in
// shared memory. Every reduction has a fixed order, so results repeat bit for bit; the only atomics
// are integer ORs.
#pragma once

#include "../raster_math.h"
#include "device.cuh"

namespace sketchfast {
namespace raster {
namespace cuda {

using namespace device;
using device::load;  // overloaded below
using device::store;
using device::sum_of_warp;

constexpr int kMaxThreads = 512;
// Fewer where a kernel takes more registers, so that two CTAs share an SM without spilling
// registers.
constexpr int kTileThreads = 384;
// The widest blur (to one side) whose halo the tile kernels carry; wider ones take kernels of their
// own.
constexpr int kMaxHalf = 16;
constexpr int kPatchWidth = 8, kPatchHeight = 4;
// Distance from the centre of a patch to its corner pixels: the root of 3.5^2 + 1.5^2.
constexpr float kPatchRadius = 3.8079f;

// --- arguments

struct Strokes {
  Input points;            // [B, steps, 2]
  const bool* pen_down;    // [B, steps], or null: all down
  const int64_t* lengths;  // [B] or null
  int64_t steps;
};

struct Canvas {
  int height, width;
};

struct Ink {
  float sharpness, offset;
  float reach;  // in pixels; negative where ink never reaches the cutoff
};

struct Blur {
  int half;  // (taps - 1) / 2; 0 is no blur
  float weight[kMaxHalf + 1];
};

// The nearest segment of each pixel, -1 for none; int16 where that holds every index.
struct Winner {
  void* data;  // null where it is not wanted
  bool wide;
};

struct Tiling {
  int width, height, across, per_sketch;
};

__device__ inline int load(const Winner& winner, int64_t i) {
  return winner.wide ? static_cast<const int32_t*>(winner.data)[i]
                     : static_cast<const int16_t*>(winner.data)[i];
}

__device__ inline void store(const Winner& winner, int64_t i, int value) {
  if (winner.wide) {
    static_cast<int32_t*>(winner.data)[i] = value;
  } else {
    static_cast<int16_t*>(winner.data)[i] = static_cast<int16_t>(value);
  }
}

// --- threads

// The sum (or least) over the CTA, in every thread. `shared` holds a float a warp, for one
// use.
template <bool kLeast>
__device__ inline float over_cta(float value, float* shared) {
  value = kLeast ? least_of_warp(value) : sum_of_warp(value);
  if (lane_index() == 0) shared[warp_index()] = value;
  __syncthreads();
  float all = shared[0];
  for (int w = 1; w < warp_count(); ++w) {
    all = kLeast ? minimum(all, shared[w]) : all + shared[w];
  }
  return all;
}

// --- rectangles

struct Rect {
  int x0, y0, x1, y1;  // x0 <= x < x1

  SKETCHFAST_HD int width() const { return x1 - x0; }
  SKETCHFAST_HD int height() const { return y1 - y0; }
  SKETCHFAST_HD int area() const { return width() * height(); }
};

SKETCHFAST_HD int smaller(int a, int b) { return a < b ? a : b; }
SKETCHFAST_HD int larger(int a, int b) { return a > b ? a : b; }

SKETCHFAST_HD Rect tile_rect(const Tiling& tiling, const Canvas& canvas, int tile) {
  const int x = tile % tiling.across * tiling.width, y = tile / tiling.across * tiling.height;
  return {x, y, smaller(x + tiling.width, canvas.width), smaller(y + tiling.height, canvas.height)};
}

SKETCHFAST_HD Rect grown(const Rect& rect, int by, const Canvas& canvas) {
  return {larger(rect.x0 - by, 0), larger(rect.y0 - by, 0), smaller(rect.x1 + by, canvas.width),
          smaller(rect.y1 + by, canvas.height)};
}

// Where a pixel of the canvas lies in a tile's planes.
struct Frame {
  int x0, y0, stride;

  __device__ explicit Frame(const Rect& rect) : x0(rect.x0), y0(rect.y0), stride(rect.width()) {}
  __device__ int at(int x, int y) const { return (y - y0) * stride + x - x0; }
};

// Runs visit(x, y) for each pixel of the rectangle, neighbouring threads on neighbouring pixels.
template <typename Visit>
__device__ inline void for_pixels(const Rect& rect, Visit visit) {
  // Exact for areas under 2^21: the quotient's distance to an integer exceeds the rounding.
  const float inverse = 1.0f / rect.width();
#pragma unroll 1
  for (int i = threadIdx.x; i < rect.area(); i += blockDim.x) {
    const int row = static_cast<int>((i + 0.5f) * inverse);
    visit(rect.x0 + i - row * rect.width(), rect.y0 + row);
  }
}

SKETCHFAST_HD int64_t pixel_offset(const Canvas& canvas, int64_t sketch, int x, int y) {
  return (sketch * canvas.height + y) * canvas.width + x;
}

// --- segments

__device__ inline bool is_finite(float value) { return value - value == 0; }

__device__ inline int segment_count(const Strokes& strokes, int64_t sketch) {
  int64_t points = strokes.steps;
  if (strokes.lengths) {
    const int64_t length = strokes.lengths[sketch];
    points = length < 0 ? 0 : length < points ? length : points;
  }
  return points > 1 ? static_cast<int>(points - 1) : 0;
}

struct Ends {
  float ax, ay, bx, by;
};

// False where the segment does not exist: pen up, or an end that is not finite.
__device__ inline bool segment_ends(const Strokes& strokes, int64_t sketch, int t, Ends* ends) {
  const int64_t point = sketch * strokes.steps + t;
  if (strokes.pen_down && !strokes.pen_down[point]) return false;
  const float ax = load(strokes.points, 2 * point), ay = load(strokes.points, 2 * point + 1);
  const float bx = load(strokes.points, 2 * point + 2), by = load(strokes.points, 2 * point + 3);
  *ends = {ax, ay, bx, by};
  return is_finite(ax) && is_finite(ay) && is_finite(bx) && is_finite(by);
}

// The segment's part within reach of the canvas: the same in forward and backward. A call of its
// own: inlined, its doubles made forward_kernel spill on sm_90.
__device__ __noinline__ bool clip_to_canvas(const Ends& e, const Canvas& canvas, float reach,
                                            Segment<float>* out) {
  return clip<float>(e.ax, e.ay, e.bx, e.by, -reach, -reach, canvas.width - 1 + reach,
                     canvas.height - 1 + reach, out);
}

// Room for what rounding of coordinates takes from a culling test.
__device__ inline float slack(const Canvas& canvas) {
  return 0.01f + 1e-6f * larger(canvas.width, canvas.height);
}

__device__ inline float distance2(const Segment<float>& s, float x, float y) {
  return squared_length(gap_to(s, x - s.x, y - s.y));
}

struct Circle {
  float x, y, radius;
};

__device__ inline Circle around(const Rect& rect) {
  const float x = 0.5f * (rect.width() - 1), y = 0.5f * (rect.height() - 1);
  return {rect.x0 + x, rect.y0 + y, sqrtf(x * x + y * y)};
}

__device__ inline bool box_meets(const Ends& e, const Rect& rect, float reach) {
  return maximum(e.ax, e.bx) >= rect.x0 - reach && minimum(e.ax, e.bx) <= rect.x1 - 1 + reach &&
         maximum(e.ay, e.by) >= rect.y0 - reach && minimum(e.ay, e.by) <= rect.y1 - 1 + reach;
}

struct alignas(16) Line {
  float x, y, dx, dy;
};
struct alignas(8) Unit {
  float x, y;
};

// The segments near a tile, in ascending order of index, in shared memory.
struct SegmentList {
  Line* line;
  Unit* unit;
  int* index;
  int* of_warp;  // how many each warp appends
  int capacity;

  SKETCHFAST_HD SegmentList(Arena* arena, int capacity) : capacity(capacity) {
    line = arena->take<Line>(capacity);
    unit = arena->take<Unit>(capacity);
    index = arena->take<int>(capacity);
    of_warp = arena->take<int>(kMaxThreads / kWarp);
  }

  __device__ void set(int slot, const Segment<float>& s, int t) {
    line[slot] = {s.x, s.y, s.dx, s.dy};
    unit[slot] = {s.ux, s.uy};
    index[slot] = t;
  }

  __device__ float distance2(int slot, float x, float y) const {
    const Line l = line[slot];
    const Unit u = unit[slot];
    const Segment<float> s{l.x, l.y, l.dx, l.dy, u.x, u.y, 0.0f, 1.0f};
    return cuda::distance2(s, x, y);
  }
};

// Appends the threads' segments t where `wanted`, in order of thread; returns the new length. Its
// barriers also part what was read of the list before from what is written to it now.
__device__ inline int append(SegmentList* list, int listed, bool wanted,
                             const Segment<float>& segment, int t) {
  const unsigned kept = __ballot_sync(kAllLanes, wanted);
  if (lane_index() == 0) list->of_warp[warp_index()] = __popc(kept);
  __syncthreads();
  int slot = listed;
  for (int w = 0; w < warp_count(); ++w) {
    if (w < warp_index()) slot += list->of_warp[w];
    listed += list->of_warp[w];
  }
  const unsigned before = (1u << lane_index()) - 1;
  if (wanted) list->set(slot + __popc(kept & before), segment, t);
  __syncthreads();
  return listed;
}

// Lists the segments that select(t, &segment) wants, and runs flush(listed) whenever the list is
// full and at the end, so that any number of segments passes through bounded memory. Returns
// whether any was listed.
template <typename Select, typename Flush>
__device__ inline bool through_list(SegmentList* list, int count, Select select, Flush flush) {
  bool any = false;
  int listed = 0;
  const int threads = blockDim.x;
#pragma unroll 1
  for (int64_t base = 0; base < count; base += threads) {
    const int t = static_cast<int>(base) + threadIdx.x;
    Segment<float> segment{};
    const bool wanted = base + threadIdx.x < count && select(t, &segment);
    listed = append(list, listed, wanted, segment, t);
    const bool last = base + threads >= count;
    if (listed > 0 && (last || listed + threads > list->capacity)) {
      flush(listed);
      any = true;
      listed = 0;
    }
  }
  return any;
}

// --- drawing

// Lowers the least squared distances of `rect` to those of the listed segments. A warp owns patches
// of 8 x 4 pixels and visits only the segments that come near the patch, in order, so that of ties
// the first stays.
__device__ inline void lower_distances(const SegmentList& list, int listed, bool fresh,
                                       const Ink& ink, float room, const Rect& rect, float* nearest,
                                       int* winner) {
  const Frame frame(rect);
  const int across = (rect.width() + kPatchWidth - 1) / kPatchWidth;
  const int patches = across * ((rect.height() + kPatchHeight - 1) / kPatchHeight);
  const float near = ink.reach + kPatchRadius + room;
  for (int patch = warp_index(); patch < patches; patch += warp_count()) {
    const int x0 = rect.x0 + patch % across * kPatchWidth;
    const int y0 = rect.y0 + patch / across * kPatchHeight;
    const int x = x0 + lane_index() % kPatchWidth, y = y0 + lane_index() / kPatchWidth;
    const bool inside = x < rect.x1 && y < rect.y1;
    float least = ink.reach * ink.reach;
    if (inside && !fresh) least = nearest[frame.at(x, y)];
    int slot = -1;
#pragma unroll 1
    for (int base = 0; base < listed; base += kWarp) {
      const int mine = base + lane_index();
      const bool close = mine < listed && list.distance2(mine, x0 + 3.5f, y0 + 1.5f) <= near * near;
      for (unsigned hits = __ballot_sync(kAllLanes, close); hits; hits &= hits - 1) {
        const int candidate = base + __ffs(hits) - 1;
        const float d2 = list.distance2(candidate, x, y);
        if (d2 < least) {
          least = d2;
          slot = candidate;
        }
      }
    }
    if (!inside) continue;
    if (fresh || slot >= 0) {
      nearest[frame.at(x, y)] = least;
      if (winner) winner[frame.at(x, y)] = slot >= 0 ? list.index[slot] : -1;
    }
  }
}

// Ink of one sketch over `rect` into the plane `out` (whose frame is rect), and the winners.
// Returns whether anything comes near; `out` is 0 and the winners -1 otherwise. Ends with a
// barrier.
__device__ inline bool draw(const Strokes& strokes, int64_t sketch, const Canvas& canvas,
                            const Ink& ink, const Rect& rect, SegmentList* list, float* out,
                            int* winner) {
  const int count = ink.reach >= 0 ? segment_count(strokes, sketch) : 0;
  const Circle circle = around(rect);
  const float room = slack(canvas), near = circle.radius + ink.reach + room;
  bool fresh = true;
  const bool any = through_list(
      list, count,
      [&](int t, Segment<float>* segment) {
        Ends ends;
        return segment_ends(strokes, sketch, t, &ends) && box_meets(ends, rect, ink.reach + room) &&
               clip_to_canvas(ends, canvas, ink.reach, segment) &&
               distance2(*segment, circle.x, circle.y) <= near * near;
      },
      [&](int listed) {
        lower_distances(*list, listed, fresh, ink, room, rect, out, winner);
        fresh = false;
      });
  __syncthreads();
  for (int i = threadIdx.x; i < rect.area(); i += blockDim.x) {
    const bool drawn = any && out[i] < ink.reach * ink.reach;
    out[i] = drawn ? ink_at(out[i], ink.sharpness, ink.offset) : 0.0f;
    if (!any && winner) winner[i] = -1;
  }
  __syncthreads();
  return any;
}

// --- blur

// One axis of the Gaussian at pixels of `to`, of a plane that is 0 outside `from`: put(x, y,
// value).
template <bool kRows, typename Put>
__device__ inline void blur_axis(const Blur& blur, const Frame& frame, const float* in,
                                 const Rect& from, const Rect& to, Put put) {
  const int step = kRows ? 1 : frame.stride;
  for_pixels(to, [&](int x, int y) {
    const int at = frame.at(x, y);
    const int before = kRows ? x - from.x0 : y - from.y0;
    const int after = kRows ? from.x1 - 1 - x : from.y1 - 1 - y;
    float sum = blur.weight[0] * in[at];
#pragma unroll 2
    for (int k = 1; k <= blur.half; ++k) {
      const float low = k <= before ? in[at - k * step] : 0.0f;
      const float high = k <= after ? in[at + k * step] : 0.0f;
      sum += blur.weight[k] * (low + high);
    }
    put(x, y, sum);
  });
}

// The whole blur of `plane` (0 outside `from`) at pixels of `to`. put may write to `plane`: the
// columns read only `scratch`.
template <typename Put>
__device__ inline void blur_plane(const Blur& blur, const Frame& frame, const float* plane,
                                  float* scratch, const Rect& from, const Rect& to, Put put) {
  const Rect rows{to.x0, from.y0, to.x1, from.y1};
  blur_axis<true>(blur, frame, plane, from, rows,
                  [&](int x, int y, float value) { scratch[frame.at(x, y)] = value; });
  __syncthreads();
  blur_axis<false>(blur, frame, scratch, rows, to, put);
}

// --- gradients of points

// The four sums over the warp: lane 0 has start_x, 8 end_x, 16 start_y, 24 end_y. Halving what each
// lane carries takes 6 exchanges where four sums apart take 20.
__device__ inline float sum_of_warp(const SegmentGrad<float>& part) {
  const bool high = lane_index() & 16, odd = lane_index() & 8;
  float start = high ? part.start_y : part.start_x, end = high ? part.end_y : part.end_x;
  start += __shfl_xor_sync(kAllLanes, high ? part.start_x : part.start_y, 16);
  end += __shfl_xor_sync(kAllLanes, high ? part.end_x : part.end_y, 16);
  float sum = odd ? end : start;
  sum += __shfl_xor_sync(kAllLanes, odd ? start : end, 8);
  for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

struct GradSum {
  float of[4];  // start_x, end_x, start_y, end_y
};

// Shared memory of a run of points: its segments and the one before it.
struct RunMemory {
  Segment<float>* segment;
  GradSum* sum;
  bool* exists;
  int points;

  SKETCHFAST_HD RunMemory(Arena* arena, int points) : points(points) {
    segment = arena->take<Segment<float>>(points + 1);
    sum = arena->take<GradSum>(points + 1);
    exists = arena->take<bool>(points + 1);
  }
};

// Gradients of the points from..to-1, at most memory.points of them: a warp gathers a segment at a
// time, and each point adds the end of its segment before to the start of its own. A barrier comes
// before the first gather: what the caller wrote to shared memory is seen. The first segment of a
// run is gathered by the run before too, which costs less than a launch to combine them.
template <typename Job>
__device__ inline void gather_run(const Job& job, int64_t sketch, int64_t steps, int count,
                                  int from, int to, const RunMemory& memory, const Output& grad) {
  for (int i = threadIdx.x; i <= to - from; i += blockDim.x) {
    const int t = from - 1 + i;
    memory.exists[i] = t >= 0 && t < count && job.segment(t, &memory.segment[i]);
  }
  __syncthreads();
  for (int i = warp_index(); i <= to - from; i += warp_count()) {
    float sum = 0;
    // The same for a whole warp: it goes or stays together.
    if (memory.exists[i]) sum = sum_of_warp(job.gather(from - 1 + i, memory.segment[i]));
    if (lane_index() % 8 == 0) memory.sum[i].of[lane_index() / 8] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * (to - from); i += blockDim.x) {
    const int point = i / 2, axis = i % 2;
    const float value = memory.sum[point].of[2 * axis + 1] + memory.sum[point + 1].of[2 * axis];
    store(grad, (sketch * steps + from + point) * 2 + axis, value);
  }
}

// The pixels that may be within reach of a segment: along its longer axis one by one (`major`),
// across it as many as reach over the slope spans. Superset of the true set by less than a pixel a
// side.
struct Band {
  bool steep;  // major is y
  int first, last;
  int across;
  float major, minor, slope, length, half_width;
  int limit;  // canvas size along minor

  __device__ Band(const Segment<float>& s, const Canvas& canvas, float reach) {
    steep = fabsf(s.dy) > fabsf(s.dx);
    const float d_major = steep ? s.dy : s.dx, d_minor = steep ? s.dx : s.dy;
    slope = d_major != 0 ? d_minor / d_major : 0.0f;
    const float begin = steep ? s.y : s.x;
    major = d_major < 0 ? begin + d_major : begin;
    minor = (steep ? s.x : s.y) + (d_major < 0 ? d_minor : 0.0f);
    length = fabsf(d_major);
    limit = steep ? canvas.width : canvas.height;
    const float end = (steep ? canvas.height : canvas.width) - 1.0f;
    // Compared as floats first: a huge reach overflows int.
    first = static_cast<int>(maximum(ceilf(major - reach), 0.0f));
    last = static_cast<int>(minimum(floorf(major + length + reach), end));
    half_width = reach * sqrtf(1 + slope * slope);
    across = static_cast<int>(minimum(floorf(2 * half_width) + 1, static_cast<float>(limit)));
  }

  // The least minor coordinate at `at`; moved inside the canvas, where `across` pixels always fit.
  __device__ int begin(int at) const {
    const float along = minimum(maximum(at - major, 0.0f), length);
    const float low = ceilf(minor + slope * along - half_width);
    return static_cast<int>(minimum(maximum(low, 0.0f), static_cast<float>(limit - across)));
  }
};

// Gathers d loss / d segment from the pixels it won; Source gives winner(x, y) and grad(x, y).
template <typename Source>
struct InkJob {
  const Strokes& strokes;
  int64_t sketch;
  const Canvas& canvas;
  const Ink& ink;
  Source source;

  __device__ bool segment(int t, Segment<float>* out) const {
    Ends ends;
    return segment_ends(strokes, sketch, t, &ends) && clip_to_canvas(ends, canvas, ink.reach, out);
  }

  __device__ SegmentGrad<float> gather(int t, const Segment<float>& s) const {
    const Band band(s, canvas, ink.reach + slack(canvas));
    SegmentGrad<float> sum{};
    // Eight lanes across, four along: bands are seldom wider.
    for (int i = band.first + lane_index() / 8; i <= band.last; i += kWarp / 8) {
      const int begin = band.begin(i);
      for (int j = begin + lane_index() % 8; j < begin + band.across; j += 8) {
        const int x = band.steep ? j : i, y = band.steep ? i : j;
        if (source.winner(x, y) == t) add_pixel(s, x, y, &sum);
      }
    }
    return sum;
  }

  __device__ void add_pixel(const Segment<float>& s, int x, int y, SegmentGrad<float>* sum) const {
    const Gap<float> gap = gap_to(s, x - s.x, y - s.y);
    const float drawn = ink_at(squared_length(gap), ink.sharpness, ink.offset);
    const float slope = distance2_slope(source.grad(x, y), drawn, ink.sharpness);
    accumulate(sum, s, refined(s, gap), slope);
  }
};

struct SharedSource {
  const float* plane;
  const int* index;
  int stride;

  __device__ int winner(int x, int y) const { return index[y * stride + x]; }
  __device__ float grad(int x, int y) const { return plane[y * stride + x]; }
};

struct GlobalSource {
  Input plane;
  Winner index;
  Canvas canvas;
  int64_t sketch;

  __device__ int winner(int x, int y) const {
    return load(index, pixel_offset(canvas, sketch, x, y));
  }
  __device__ float grad(int x, int y) const {
    return load(plane, pixel_offset(canvas, sketch, x, y));
  }
};

// --- rasterize

struct ForwardParams {
  Strokes strokes;
  Canvas canvas;
  Ink ink;
  Blur blur;
  Tiling tiling;
  int capacity;  // of the segment list
  Output image;  // [B, H, W]
  Winner winner;
};

struct ForwardMemory {
  SegmentList list;
  float *plane, *scratch;
  int* winner;

  SKETCHFAST_HD ForwardMemory(Arena arena, const ForwardParams& p, int area, size_t* bytes)
      : list(&arena, p.capacity) {
    plane = arena.take<float>(area);
    scratch = p.blur.half > 0 ? arena.take<float>(area) : nullptr;
    winner = p.winner.data ? arena.take<int>(area) : nullptr;
    if (bytes) *bytes = arena.used;
  }
};

// A CTA a tile: ink in shared memory with the blur's halo around it, blurred, written once.
__global__ void __launch_bounds__(kTileThreads, 2)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  SKETCHFAST_SHARED_MEMORY(memory);
  const int64_t sketch = blockIdx.x / p.tiling.per_sketch;
  const Rect tile = tile_rect(p.tiling, p.canvas, blockIdx.x % p.tiling.per_sketch);
  const Rect halo = grown(tile, p.blur.half, p.canvas);
  const Frame frame(halo);
  ForwardMemory m(Arena{memory, 0}, p, halo.area(), nullptr);
  const bool any = draw(p.strokes, sketch, p.canvas, p.ink, halo, &m.list, m.plane, m.winner);
  const auto write = [&](int x, int y, float value) {
    const int64_t at = pixel_offset(p.canvas, sketch, x, y);
    store(p.image, at, value);
    if (p.winner.data) store(p.winner, at, m.winner[frame.at(x, y)]);
  };
  if (any && p.blur.half > 0) {
    blur_plane(p.blur, frame, m.plane, m.scratch, halo, tile, write);
  } else {
    for_pixels(tile, [&](int x, int y) { write(x, y, m.plane[frame.at(x, y)]); });
  }
}

struct BackwardParams {
  Strokes strokes;
  Canvas canvas;
  Ink ink;
  Blur blur;
  Tiling tiling;
  int run;               // points a CTA has in shared memory at a time
  Input grad;            // [B, H, W], of the image
  Winner winner;         // [B, H, W]
  float* slope;          // [B, H, W], the gradient of ink: only where a tile has winners
  Output grad_points;    // [B, steps, 2]
  const float* partial;  // [B, tiles] sums of the loss to reduce, or null
  float* loss;           // [B]
  float scale;           // loss = scale * sum
};

struct BackwardMemory {
  RunMemory run;
  float *plane, *scratch;
  int* winner;

  SKETCHFAST_HD BackwardMemory(Arena arena, const BackwardParams& p, int area, size_t* bytes)
      : run(&arena, p.run) {
    plane = arena.take<float>(area);
    scratch = p.blur.half > 0 ? arena.take<float>(area) : nullptr;
    winner = arena.take<int>(area);
    if (bytes) *bytes = arena.used;
  }
};

// All points of one sketch, run after run.
template <typename Job>
__device__ inline void gather_sketch(const Job& job, const Strokes& strokes, int64_t sketch,
                                     int count, const RunMemory& run, const Output& grad) {
  const int steps = static_cast<int>(strokes.steps);
  for (int from = 0; from < steps; from += run.points) {
    gather_run(job, sketch, steps, count, from, from + smaller(run.points, steps - from), run,
               grad);
  }
}

// A CTA a sketch, for images that fit in shared memory: blur^T of the gradient, then the gather.
__global__ void __launch_bounds__(kMaxThreads, 2)
    backward_sketch_kernel(const __grid_constant__ BackwardParams p) {
  SKETCHFAST_SHARED_MEMORY(memory);
  const int64_t sketch = blockIdx.x;
  const Rect all{0, 0, p.canvas.width, p.canvas.height};
  const Frame frame(all);
  const BackwardMemory m(Arena{memory, 0}, p, all.area(), nullptr);
  for (int i = threadIdx.x; i < all.area(); i += blockDim.x) {
    m.plane[i] = load(p.grad, sketch * all.area() + i);
    m.winner[i] = load(p.winner, sketch * all.area() + i);
  }
  __syncthreads();
  if (p.blur.half > 0) {
    blur_plane(p.blur, frame, m.plane, m.scratch, all, all,
               [&](int x, int y, float value) { m.plane[frame.at(x, y)] = value; });
  }
  const InkJob<SharedSource> job{
      p.strokes, sketch, p.canvas, p.ink, {m.plane, m.winner, p.canvas.width}};
  const int count = segment_count(p.strokes, sketch);
  gather_sketch(job, p.strokes, sketch, count, m.run, p.grad_points);
}

// A CTA a tile: blur^T of the gradient, only where something was drawn.
__global__ void __launch_bounds__(kMaxThreads, 2)
    blur_grad_kernel(const __grid_constant__ BackwardParams p) {
  SKETCHFAST_SHARED_MEMORY(memory);
  const int64_t sketch = blockIdx.x / p.tiling.per_sketch;
  const Rect tile = tile_rect(p.tiling, p.canvas, blockIdx.x % p.tiling.per_sketch);
  bool mine = false;
  for_pixels(tile, [&](int x, int y) {
    mine = mine || load(p.winner, pixel_offset(p.canvas, sketch, x, y)) >= 0;
  });
  if (!__syncthreads_or(mine)) return;
  const Rect halo = grown(tile, p.blur.half, p.canvas);
  const Frame frame(halo);
  Arena arena{memory, 0};
  float* plane = arena.take<float>(halo.area());
  float* scratch = arena.take<float>(halo.area());
  for_pixels(halo, [&](int x, int y) {
    plane[frame.at(x, y)] = load(p.grad, pixel_offset(p.canvas, sketch, x, y));
  });
  __syncthreads();
  blur_plane(p.blur, frame, plane, scratch, halo, tile, [&](int x, int y, float value) {
    p.slope[pixel_offset(p.canvas, sketch, x, y)] = value;
  });
}

// Sums the tiles' parts of a sketch's loss; one warp, in double, in fixed order.
__device__ inline void reduce_loss(const float* partial, int tiles, int64_t sketch, float scale,
                                   float* loss) {
  double sum = 0;
  for (int i = lane_index(); i < tiles; i += kWarp) {
    sum += partial[sketch * tiles + i];
  }
  sum = sum_of_warp(sum);
  if (lane_index() == 0) loss[sketch] = static_cast<float>(sum * scale);
}

__global__ void __launch_bounds__(kWarp) loss_kernel(const __grid_constant__ BackwardParams p) {
  reduce_loss(p.partial, p.tiling.per_sketch, blockIdx.x, p.scale, p.loss);
}

// A CTA a run of points, the planes in global memory.
__global__ void __launch_bounds__(256, 4) gather_kernel(const __grid_constant__ BackwardParams p) {
  SKETCHFAST_SHARED_MEMORY(memory);
  const int steps = static_cast<int>(p.strokes.steps);
  const int runs = (steps - 1) / p.run + 1;
  const int64_t sketch = blockIdx.x / runs;
  const int from = static_cast<int>(blockIdx.x % runs) * p.run;
  if (p.partial && from == 0 && warp_index() == 0) {
    reduce_loss(p.partial, p.tiling.per_sketch, sketch, p.scale, p.loss);
  }
  Arena arena{memory, 0};
  const RunMemory run(&arena, p.run);
  const Input slope = p.slope ? Input{p.slope, Dtype::kFloat32} : p.grad;
  const InkJob<GlobalSource> job{
      p.strokes, sketch, p.canvas, p.ink, {slope, p.winner, p.canvas, sketch}};
  const int count = segment_count(p.strokes, sketch);
  gather_run(job, sketch, steps, count, from, from + smaller(p.run, steps - from), run,
             p.grad_points);
}

// --- the fused loss

struct LossParams {
  Strokes strokes, target_strokes;
  const float* target;  // [B, H, W], or null where target_strokes give it
  Canvas canvas;
  Ink ink;
  Blur blur;
  Tiling tiling;
  int capacity, run;
  bool need_grad;
  float scale;         // 1 / (H W)
  float* loss;         // [B]; or with tiles their parts, [B, tiles]
  Output grad_points;  // [B, steps, 2]
  Winner winner;       // [B, H, W], with tiles and need_grad
  float* slope;        // [B, H, W], likewise
};

struct LossMemory {
  SegmentList list;
  RunMemory run;
  float *plane, *scratch, *target, *reduction;
  int* winner;

  SKETCHFAST_HD LossMemory(Arena arena, const LossParams& p, int area, size_t* bytes)
      : list(&arena, p.capacity), run(&arena, p.run) {
    plane = arena.take<float>(area);
    scratch = p.blur.half > 0 ? arena.take<float>(area) : nullptr;
    target = p.target ? nullptr : arena.take<float>(area);
    winner = p.need_grad ? arena.take<int>(area) : nullptr;
    reduction = arena.take<float>(kMaxThreads / kWarp);
    if (bytes) *bytes = arena.used;
  }
};

// Draws and blurs one sketch: over `wide` its ink, over `narrow` the result, in `out`. `out` may be
// the plane.
__device__ inline bool draw_blurred(const LossParams& p, const Strokes& strokes, int64_t sketch,
                                    const Rect& wide, const Rect& narrow, LossMemory* m,
                                    int* winner, float* out) {
  const Frame frame(wide);
  const bool any = draw(strokes, sketch, p.canvas, p.ink, wide, &m->list, m->plane, winner);
  if (any && p.blur.half > 0) {
    blur_plane(p.blur, frame, m->plane, m->scratch, wide, narrow,
               [&](int x, int y, float value) { out[frame.at(x, y)] = value; });
  } else if (out != m->plane) {
    for (int i = threadIdx.x; i < wide.area(); i += blockDim.x) out[i] = m->plane[i];
  }
  __syncthreads();
  return any;
}

// The loss summed over `tile`, and its slope in the image over `sloped` in place of the image.
__device__ inline float loss_and_slope(const LossParams& p, int64_t sketch, const Rect& tile,
                                       const Rect& sloped, const Frame& frame,
                                       const LossMemory& m) {
  float sum = 0;
  for_pixels(sloped, [&](int x, int y) {
    const int at = frame.at(x, y);
    const float target = p.target ? p.target[pixel_offset(p.canvas, sketch, x, y)] : m.target[at];
    const Loss<float> loss = cross_entropy<float, float>(m.plane[at], target);
    const bool inside = x >= tile.x0 && x < tile.x1 && y >= tile.y0 && y < tile.y1;
    sum += inside ? loss.value : 0.0f;
    m.plane[at] = p.scale * loss.slope;
  });
  return over_cta<false>(sum, m.reduction);
}

// A CTA a tile: both images with a double halo, loss, blur^T of its slope. With kWhole the tile is
// the image and the CTA goes on to the gradients of the points, so that one launch is all.
template <bool kWhole>
__global__ void __launch_bounds__(kWhole ? kMaxThreads : kTileThreads, kWhole ? 1 : 2)
    bce_kernel(const __grid_constant__ LossParams p) {
  SKETCHFAST_SHARED_MEMORY(memory);
  const int64_t sketch = blockIdx.x / p.tiling.per_sketch;
  const Rect tile = tile_rect(p.tiling, p.canvas, blockIdx.x % p.tiling.per_sketch);
  const Rect middle = grown(tile, p.need_grad ? p.blur.half : 0, p.canvas);
  const Rect wide = grown(middle, p.blur.half, p.canvas);
  const Frame frame(wide);
  LossMemory m(Arena{memory, 0}, p, wide.area(), nullptr);
  bool any = false, target_any = p.target != nullptr;
  // A loop, so that the compiler keeps one copy of the drawing: two took registers from both.
#pragma unroll 1
  for (int prediction = p.target ? 1 : 0; prediction < 2; ++prediction) {
    const Strokes& strokes = prediction ? p.strokes : p.target_strokes;
    const bool drawn =
        draw_blurred(p, strokes, sketch, wide, middle, &m, prediction ? m.winner : nullptr,
                     prediction ? m.plane : m.target);
    (prediction ? any : target_any) = drawn;
  }
  const bool sloped = any && p.need_grad;
  // Most tiles of a large canvas are blank in both images: no logarithms for them.
  const float sum = any || target_any
                        ? loss_and_slope(p, sketch, tile, sloped ? middle : tile, frame, m)
                        : static_cast<float>(kBlankLoss) * tile.area();
  if (threadIdx.x == 0) p.loss[blockIdx.x] = kWhole ? p.scale * sum : sum;
  if (!p.need_grad) return;
  if (sloped && p.blur.half > 0) {
    blur_plane(p.blur, frame, m.plane, m.scratch, middle, tile,
               [&](int x, int y, float value) { m.plane[frame.at(x, y)] = value; });
  }
  if (kWhole) {
    const InkJob<SharedSource> job{
        p.strokes, sketch, p.canvas, p.ink, {m.plane, m.winner, p.canvas.width}};
    const int count = any ? segment_count(p.strokes, sketch) : 0;
    gather_sketch(job, p.strokes, sketch, count, m.run, p.grad_points);
  } else {
    for_pixels(tile, [&](int x, int y) {
      const int64_t at = pixel_offset(p.canvas, sketch, x, y);
      store(p.winner, at, m.winner[frame.at(x, y)]);
      if (any) p.slope[at] = m.plane[frame.at(x, y)];
    });
  }
}

// --- blurs wider than a tile's halo

struct WideBlurParams {
  Input in;    // [B, H, W]
  Output out;  // [B, H, W]
  Canvas canvas;
  int64_t pixels;  // B H W
  int64_t half;
  float decay;  // 1 / (2 sigma^2)
  float scale;  // 1 / sum of the weights
  bool rows;
};

// One axis, straight from memory. Weights are formed as they are met: they may outnumber any
// buffer.
__global__ void __launch_bounds__(256) wide_blur_kernel(const __grid_constant__ WideBlurParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.pixels) return;
  const int x = static_cast<int>(i % p.canvas.width);
  const int y = static_cast<int>(i / p.canvas.width % p.canvas.height);
  const int at = p.rows ? x : y, size = p.rows ? p.canvas.width : p.canvas.height;
  const int64_t step = p.rows ? 1 : p.canvas.width;
  const int before = p.half < at ? static_cast<int>(p.half) : at;
  const int after = p.half < size - 1 - at ? static_cast<int>(p.half) : size - 1 - at;
  float sum = 0;
  for (int k = -before; k <= after; ++k) {
    const float distance = static_cast<float>(k);
    sum += expf(-p.decay * distance * distance) * load(p.in, i + k * step);
  }
  store(p.out, i, p.scale * sum);
}

struct PixelLossParams {
  const float* image;   // [B, H, W]
  const float* target;  // [B, H, W]
  int64_t pixels;       // H W
  int chunk, chunks;    // pixels a CTA, CTAs a sketch
  float scale;
  float* partial;  // [B, chunks]
  float* slope;    // [B, H, W] or null
};

// Loss and slope of images that were drawn before.
__global__ void __launch_bounds__(256)
    pixel_loss_kernel(const __grid_constant__ PixelLossParams p) {
  SKETCHFAST_SHARED_MEMORY(memory);
  const int64_t sketch = blockIdx.x / p.chunks;
  const int64_t first = static_cast<int64_t>(blockIdx.x % p.chunks) * p.chunk;
  const int64_t rest = p.pixels - first, here = rest < p.chunk ? rest : p.chunk;
  float sum = 0;
  for (int i = threadIdx.x; i < here; i += blockDim.x) {
    const int64_t at = sketch * p.pixels + first + i;
    const Loss<float> loss = cross_entropy<float, float>(p.image[at], p.target[at]);
    sum += loss.value;
    if (p.slope) p.slope[at] = p.scale * loss.slope;
  }
  sum = over_cta<false>(sum, reinterpret_cast<float*>(memory));
  if (threadIdx.x == 0) p.partial[blockIdx.x] = sum;
}

// --- stroke_distance

struct DistanceParams {
  Strokes strokes;
  Canvas canvas;
  Tiling tiling;
  int capacity, run, words;
  float* distance2;    // [B, H, W]
  int32_t* segment;    // [B, H, W]; in the backward an input
  const float* grad;   // [B, H, W], of distance2
  unsigned* present;   // [B, tiles, words]: a bit for each segment that won a pixel of the tile
  Output grad_points;  // [B, steps, 2]
};

struct DistanceMemory {
  SegmentList list;
  float* reduction;

  SKETCHFAST_HD DistanceMemory(Arena arena, const DistanceParams& p, size_t* bytes)
      : list(&arena, p.capacity) {
    reduction = arena.take<float>(kMaxThreads / kWarp);
    if (bytes) *bytes = arena.used;
  }
};

__device__ inline bool trimmed_segment(const Strokes& strokes, int64_t sketch, int t,
                                       const Canvas& canvas, Segment<float>* out) {
  Ends e;
  if (!segment_ends(strokes, sketch, t, &e)) return false;
  trim<float>(e.ax, e.ay, e.bx, e.by, 0, 0, canvas.width - 1, canvas.height - 1, out);
  return true;
}

constexpr int kDistanceTile = 16;

// A CTA a tile of 16 x 16, a thread a pixel. A segment farther from the tile's centre than the
// nearest one by more than the tile's diameter is nearest to no pixel of it.
__global__ void __launch_bounds__(kDistanceTile* kDistanceTile, 2)
    distance_kernel(const __grid_constant__ DistanceParams p) {
  SKETCHFAST_SHARED_MEMORY(memory);
  const int64_t sketch = blockIdx.x / p.tiling.per_sketch;
  const Rect tile = tile_rect(p.tiling, p.canvas, blockIdx.x % p.tiling.per_sketch);
  const Circle circle = around(tile);
  DistanceMemory m(Arena{memory, 0}, p, nullptr);
  const int count = segment_count(p.strokes, sketch);
  float least = HUGE_VALF;
  for (int t = threadIdx.x; t < count; t += blockDim.x) {
    Segment<float> segment;
    if (trimmed_segment(p.strokes, sketch, t, p.canvas, &segment)) {
      least = minimum(least, distance2(segment, circle.x, circle.y));
    }
  }
  const float near =
      1.00001f * (sqrtf(over_cta<true>(least, m.reduction)) + 2 * circle.radius) + slack(p.canvas);
  const int x = tile.x0 + threadIdx.x % kDistanceTile, y = tile.y0 + threadIdx.x / kDistanceTile;
  float best = HUGE_VALF;
  int winner = -1;
  through_list(
      &m.list, count,
      [&](int t, Segment<float>* segment) {
        return trimmed_segment(p.strokes, sketch, t, p.canvas, segment) &&
               sqrtf(distance2(*segment, circle.x, circle.y)) <= near;
      },
      [&](int listed) {
        for (int i = 0; i < listed; ++i) {
          const float d2 = m.list.distance2(i, x, y);
          if (d2 < best) {
            best = d2;
            winner = m.list.index[i];
          }
        }
      });
  if (x >= tile.x1 || y >= tile.y1) return;
  const int64_t at = pixel_offset(p.canvas, sketch, x, y);
  p.distance2[at] = best;
  p.segment[at] = winner;
}

// Which segments won pixels of which tile: what the gather below needs to skip the rest.
__global__ void __launch_bounds__(256) present_kernel(const __grid_constant__ DistanceParams p) {
  const int64_t sketch = blockIdx.x / p.tiling.per_sketch;
  const Rect tile = tile_rect(p.tiling, p.canvas, blockIdx.x % p.tiling.per_sketch);
  unsigned* present = p.present + static_cast<int64_t>(blockIdx.x) * p.words;
  for (int i = threadIdx.x; i < p.words; i += blockDim.x) present[i] = 0;
  __syncthreads();
  for_pixels(tile, [&](int x, int y) {
    const int64_t at = pixel_offset(p.canvas, sketch, x, y);
    const int winner = p.segment[at];
    const bool told = x > tile.x0 && p.segment[at - 1] == winner;
    if (winner >= 0 && !told) atomicOr(&present[winner / 32], 1u << (winner % 32));
  });
}

// Gathers d loss / d segment from every tile where it won, whole tiles at a time.
struct DistanceJob {
  const DistanceParams& p;
  int64_t sketch;

  __device__ bool segment(int t, Segment<float>* out) const {
    return trimmed_segment(p.strokes, sketch, t, p.canvas, out);
  }

  __device__ SegmentGrad<float> gather(int t, const Segment<float>& s) const {
    SegmentGrad<float> sum{};
    for (int base = 0; base < p.tiling.per_sketch; base += kWarp) {
      const int mine = base + lane_index();
      const bool won = mine < p.tiling.per_sketch && has(mine, t);
      for (unsigned tiles = __ballot_sync(kAllLanes, won); tiles; tiles &= tiles - 1) {
        add_tile(base + __ffs(tiles) - 1, t, s, &sum);
      }
    }
    return sum;
  }

  __device__ bool has(int tile, int t) const {
    const int64_t row = sketch * p.tiling.per_sketch + tile;
    return p.present[row * p.words + t / 32] >> (t % 32) & 1;
  }

  __device__ void add_tile(int tile, int t, const Segment<float>& s,
                           SegmentGrad<float>* sum) const {
    const Rect rect = tile_rect(p.tiling, p.canvas, tile);
    const int x = rect.x0 + lane_index();
    if (x >= rect.x1) return;
    for (int y = rect.y0; y < rect.y1; ++y) {
      const int64_t at = pixel_offset(p.canvas, sketch, x, y);
      if (p.segment[at] != t) continue;
      accumulate(sum, s, refined(s, gap_to(s, x - s.x, y - s.y)), p.grad[at]);
    }
  }
};

__global__ void __launch_bounds__(256, 2)
    distance_gather_kernel(const __grid_constant__ DistanceParams p) {
  SKETCHFAST_SHARED_MEMORY(memory);
  const int steps = static_cast<int>(p.strokes.steps);
  const int runs = (steps - 1) / p.run + 1;
  const int64_t sketch = blockIdx.x / runs;
  const int from = static_cast<int>(blockIdx.x % runs) * p.run;
  Arena arena{memory, 0};
  const RunMemory run(&arena, p.run);
  gather_run(DistanceJob{p, sketch}, sketch, steps, steps - 1, from,
             from + smaller(p.run, steps - from), run, p.grad_points);
}

}  // namespace cuda
}  // namespace raster
}  // namespace sketchfast

// Triplet losses on the CPU, an anchor at a time.
//
// All ranking triplets: an anchor's columns are sorted by the teacher's distance; of a pair in that
// order the first is drawn near and the second pushed off, so that only distances are left to
// compare. Few columns are compared pair by pair, lanes over one of the two. Many are put into a
// tree of counts over their ranks by distance, one after another in the teacher's order: how many
// columns before this one are nearer than d + margin is then three loads. Either way the result is
// integers, and no order of threads can change them.
//
// Distances come from differences, lanes over gallery rows packed into panels, a block of anchors
// at a time; the B x B matrix is never held. Backward forms them again.
#include <limits>
#include <type_traits>

#include "../triplet_math.h"
#include "elements.h"
#include "isa.h"
#include "memory.h"

namespace sketchfast {
namespace triplet_cpu {

enum class Mining : int32_t { all, hardest, semihard, random };

// Query and gallery rows [batch, dimensions], or, where `matrix` is not null, their distances.
struct Embeddings {
  const void *query, *gallery, *matrix;
  int64_t batch, dimensions;
  bool squared, is_double;
  double margin;
};
// Distances between photos, read where they are.
struct Teacher {
  const void* data;
  Dtype dtype;
  int64_t rows, row_stride, column_stride;
  const int64_t* indices;  // null: row i of the batch is row i
};
struct Pairs {
  const int32_t* labels;  // 0, 1, ...: one number a label; null: all labels differ
  Mining mining;
  uint64_t seed;
};
// Which triplets a sparse backward goes through: `samples` drawn an anchor, or one chosen negative.
struct Listed {
  const int8_t* active;
  uint64_t seed;
  int64_t samples;
  const int32_t* chosen;  // null: sampled
};

// What one instruction set offers. Ranges are of anchors but for `pack`, of panels, and `sum_parts`
// and `listed_gallery_grad`, of gallery rows.
struct Kernels {
  int64_t (*panel_count)(const Embeddings&);
  int64_t (*panel_bytes)(const Embeddings&);
  void (*pack)(const Embeddings&, void* panels, int64_t begin, int64_t end);
  void (*rank_all)(const Embeddings&, const void* panels, const Teacher&, int64_t tree_from,
                   int32_t* weights, double* losses, int64_t begin, int64_t end);
  void (*rank_samples)(const Embeddings&, const Teacher&, uint64_t seed, int64_t samples,
                       int8_t* active, int32_t* weights, double* losses, int64_t begin,
                       int64_t end);
  void (*pairs)(const Embeddings&, const void* panels, const Pairs&, int32_t* state,
                int64_t* considered, double* losses, int64_t begin, int64_t end);
  int64_t (*part_bytes)(const Embeddings&);
  void (*weighted_grad)(const Embeddings&, const void* panels, const int32_t* weights, double scale,
                        void* grad_query, void* part, int64_t begin, int64_t end);
  void (*sum_parts)(const Embeddings&, const void* parts, int64_t count, void* grad_gallery,
                    int64_t begin, int64_t end);
  void (*listed_query_grad)(const Embeddings&, const Listed&, double scale, void* grad_query,
                            int64_t begin, int64_t end);
  void (*listed_gallery_grad)(const Embeddings&, const Listed&, double scale, void* grad_gallery,
                              int64_t begin, int64_t end);
};
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif
extern const Kernels baseline_kernels;

inline namespace SKETCHFAST_ISA {

constexpr int64_t kBlockAnchors = 16;     // whose distances are formed together
constexpr int64_t kSliceDimensions = 32;  // summed apart: short chains of roundings
constexpr int kQueries = 4, kPanels = kVectorBytes == 64 ? 4 : 2;  // of a tile held in registers
constexpr int64_t kRankByCounting = 320;  // columns: above, digits sort faster than comparing all

// --- distances ----------------------------------------------------------------------------------

template <typename real>
int64_t padded_columns(int64_t batch) {
  constexpr int64_t columns = kPanels * kLanes<real>;
  return (batch + columns - 1) / columns * columns;
}

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

// Panel p holds gallery rows p * lanes ... transposed: [dimensions][lanes]; rows past the end are
// 0.
template <typename real>
void pack_panels(const Embeddings& from, real* panels, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<real>;
  const real* gallery = static_cast<const real*>(from.gallery);
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t row = panel * lanes + lane;
      real* to = panels + panel * from.dimensions * lanes + lane;
      const real* source = gallery + row * from.dimensions;
      for (int64_t d = 0; d < from.dimensions; ++d)
        to[d * lanes] = row < from.batch ? source[d] : real(0);
    }
}

// Adds a slice of dimensions to kQueries by kPanels * lanes squared distances.
template <typename real>
void add_squares(const real* const* query, const real* panels, int64_t panel_stride, int64_t slice,
                 real* const* to) {
  using V = typename Simd<real>::V;
  constexpr int64_t lanes = kLanes<real>;
  V sum[kQueries][kPanels] = {};
  for (int64_t d = 0; d < slice; ++d) {
    V row[kPanels];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) row[p] = load<V>(panels + p * panel_stride + d * lanes);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const V point = V{} + query[q][d];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        const V gap = point - row[p];
        sum[q][p] += gap * gap;
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p)
      store(to[q] + p * lanes, load<V>(to[q] + p * lanes) + sum[q][p]);
}

// to[a][j] = distance of query row `first + a` to gallery row j; `columns` = padded_columns apart.
template <typename real>
void block_distances(const Embeddings& from, const real* panels, int64_t first, int64_t anchors,
                     int64_t columns, real* to) {
  constexpr int64_t lanes = kLanes<real>;
  const int64_t dimensions = from.dimensions;
  const real* query = static_cast<const real*>(from.query);
  fill(to, kBlockAnchors * columns, real(0));
  for (int64_t d = 0; d < dimensions; d += kSliceDimensions) {
    const int64_t slice = dimensions - d < kSliceDimensions ? dimensions - d : kSliceDimensions;
    for (int64_t j = 0; j < columns; j += kPanels * lanes)
      for (int64_t a = 0; a < anchors; a += kQueries) {
        const real* rows[kQueries];
        real* sums[kQueries];
        for (int q = 0; q < kQueries; ++q) {
          const int64_t row = first + a + q < from.batch ? first + a + q : from.batch - 1;
          rows[q] = query + row * dimensions + d;
          sums[q] = to + (a + q) * columns + j;
        }
        add_squares(rows, panels + j * dimensions + d * lanes, dimensions * lanes, slice, sums);
      }
  }
  if (from.squared) return;
  for (int64_t i = 0; i < anchors * columns; ++i) to[i] = root(to[i]);
}

// One distance, lanes over dimensions.
template <typename real>
real distance(const real* x, const real* y, int64_t dimensions, bool squared) {
  using V = typename Simd<real>::V;
  constexpr int64_t lanes = kLanes<real>;
  V sum[2] = {};
  int64_t d = 0;
  for (; d + 2 * lanes <= dimensions; d += 2 * lanes)
    for (int half = 0; half < 2; ++half) {
      const V gap = load<V>(x + d + half * lanes) - load<V>(y + d + half * lanes);
      sum[half] += gap * gap;
    }
  double total = sum_of_lanes(sum[0] + sum[1]);
  for (; d < dimensions; ++d) total += double(x[d] - y[d]) * double(x[d] - y[d]);
  return real(squared ? total : root(total));
}

// --- the teacher's order ------------------------------------------------------------------------

// Integers in the order of the numbers: equal for equal ones, NaN above all.
inline int32_t sortable(float value) {
  if (value != value) return std::numeric_limits<int32_t>::max();
  const int32_t bits = int32_t(float_to_bits(value));
  if (bits == std::numeric_limits<int32_t>::min())
    return 0;  // -0: KERNEL_OPTIONS let value + 0 be folded away
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline int64_t sortable(double value) {
  if (value != value) return std::numeric_limits<int64_t>::max();
  int64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (bits == std::numeric_limits<int64_t>::min()) return 0;
  return bits ^ ((bits >> 63) & 0x7fffffffffffffff);
}

// Adds 1 in the lanes where the condition holds: one masked addition, if written so.
template <typename I>
SKETCHFAST_INLINE void count_where(I condition, I& counts) {
  counts = select(condition, counts + 1, counts);
}

// Memory of one sort of up to `most` integers.
template <typename Key>
struct Sorter {
  static constexpr int kDigitBits = 11, kBuckets = 1 << kDigitBits;
  static constexpr int kDigits = (8 * sizeof(Key) + kDigitBits - 1) / kDigitBits;
  using Unsigned = std::make_unsigned_t<Key>;
  Key *keys, *other_keys;
  int32_t *index, *other_index, *counts;

  Sorter(Arena& arena, int64_t most)
      : keys(arena.take<Key>(most)),
        other_keys(arena.take<Key>(most)),
        index(arena.take<int32_t>(most)),
        other_index(arena.take<int32_t>(most)),
        counts(arena.take<int32_t>(most ? kDigits * kBuckets : 0)) {}
  static int64_t bytes(int64_t most) {
    return 2 * (Arena::bytes_of<Key>(most) + Arena::bytes_of<int32_t>(most)) +
           Arena::bytes_of<int32_t>(most ? kDigits * kBuckets : 0);
  }

  // Sorts keys[0 .. count) and index with them; equal keys stay in order.
  void sort(int64_t count) {
    if constexpr (sizeof(Key) == 4)
      if (count <= kRankByCounting) return place(count);
    fill(counts, kDigits * kBuckets, int32_t(0));
    for (int64_t i = 0; i < count; ++i)
      for (int digit = 0; digit < kDigits; ++digit)
        ++counts[digit * kBuckets + bucket(keys[i], digit)];
    for (int digit = 0; digit < kDigits; ++digit) scatter(count, digit);
  }

 private:
  static int64_t bucket(Key key, int digit) {
    const Unsigned flipped = Unsigned(key) ^ (Unsigned(1) << (8 * sizeof(Key) - 1));
    return int64_t((flipped >> (digit * kDigitBits)) & (kBuckets - 1));
  }

  void swap() {
    Key* key = keys;
    keys = other_keys;
    other_keys = key;
    int32_t* i = index;
    index = other_index;
    other_index = i;
  }

  void scatter(int64_t count, int digit) {
    int32_t* places = counts + digit * kBuckets;
    if (count == 0 || places[bucket(keys[0], digit)] == count) return;  // one bucket holds all
    int32_t sum = 0;
    for (int64_t b = 0; b < kBuckets; ++b) {
      const int32_t size = places[b];
      places[b] = sum;
      sum += size;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t to = places[bucket(keys[i], digit)]++;
      other_keys[to] = keys[i];
      other_index[to] = index[i];
    }
    swap();
  }

  // A key's place is how many come before it: for few keys the quickest way.
  void place(int64_t count) {
    using I = Int32V;
    constexpr int64_t lanes = kLanes<float>;
    I step;
    for (int64_t lane = 0; lane < lanes; ++lane) step[lane] = int32_t(lane);
    const auto equal_or_less = [&](I own, int64_t k) { return (I{} + keys[k]) <= own; };
    for (int64_t first = 0; first < count; first += lanes) {
      const int64_t end = first + lanes < count ? first + lanes : count;
      I own = {}, before = {};
      std::memcpy(&own, keys + first, (end - first) * sizeof(Key));
      const I position = step + int32_t(first);
#pragma GCC unroll 4
      for (int64_t k = 0; k < first; ++k) count_where(equal_or_less(own, k), before);
      for (int64_t k = first; k < end; ++k)
        count_where(
            ((I{} + keys[k]) < own) | (equal_or_less(own, k) & (I{} + int32_t(k) < position)),
            before);
#pragma GCC unroll 4
      for (int64_t k = end; k < count; ++k) count_where((I{} + keys[k]) < own, before);
      for (int64_t i = first; i < end; ++i) {
        other_keys[before[i - first]] = keys[i];
        other_index[before[i - first]] = index[i];
      }
    }
    swap();
  }
};

// Which of the teacher's rows row i of the batch is; an index out of range is the nearest in it.
inline int64_t row_of(const Teacher& teacher, int64_t i) {
  const int64_t row = teacher.indices ? teacher.indices[i] : i;
  return row < 0 ? 0 : row >= teacher.rows ? teacher.rows - 1 : row;
}

// Calls use(j, value) with the teacher's distances of anchor i to all others, as they are stored.
template <typename Element, typename Widen, typename Use>
void each_teacher(const Teacher& teacher, int64_t anchor, int64_t batch, Widen widen, Use use) {
  const Element* row =
      static_cast<const Element*>(teacher.data) + row_of(teacher, anchor) * teacher.row_stride;
  for (int64_t j = 0; j < anchor; ++j)
    use(j, widen(row[row_of(teacher, j) * teacher.column_stride]));
  for (int64_t j = anchor + 1; j < batch; ++j)
    use(j, widen(row[row_of(teacher, j) * teacher.column_stride]));
}

// --- counting -----------------------------------------------------------------------------------

// Counts of columns by their rank, of which one is added at a time: how many ranks below x are in.
// A count of 32 ranks, of 32 such groups, and of what lies before: a step each to add or to ask.
class RankTree {
 public:
  RankTree(Arena& arena, int64_t most)
      : within_(arena.take<uint16_t>(rounded(most))),
        groups_(arena.take<uint16_t>(rounded(most / kGroup + 1))),
        tops_(arena.take<int32_t>(tops(most))),
        steps_(arena.take<uint16_t>(kGroup * kGroup)),
        most_(most) {
    for (uint32_t own = 0; own < kGroup; ++own)
      for (uint32_t other = 0; other < kGroup; ++other) steps_[own * kGroup + other] = other > own;
    for (int lane = 0; lane < kLanes<float>; ++lane) first_tops_[lane] = lane;
  }
  static int64_t bytes(int64_t most) {
    return Arena::bytes_of<uint16_t>(rounded(most)) +
           Arena::bytes_of<uint16_t>(rounded(most / kGroup + 1)) +
           Arena::bytes_of<int32_t>(tops(most)) + Arena::bytes_of<uint16_t>(kGroup * kGroup);
  }

  void clear() {
    fill(within_, rounded(most_), uint16_t(0));
    fill(groups_, rounded(most_ / kGroup + 1), uint16_t(0));
    fill(tops_, tops(most_), int32_t(0));
  }

  void add(uint32_t rank) {
    const uint32_t group = rank / kGroup, top = group / kGroup;
    add_steps(within_ + group * kGroup, steps_ + (rank % kGroup) * kGroup);
    add_steps(groups_ + top * kGroup, steps_ + (group % kGroup) * kGroup);
    Int32V position = first_tops_;
    for (int64_t t = 0, size = tops(most_); t < size; t += kLanes<float>) {
      Int32V counts = load<Int32V>(tops_ + t);
      count_where(position > Int32V{} + int32_t(top), counts);
      store(tops_ + t, counts);
      position += kLanes<float>;
    }
  }

  int32_t below(uint32_t rank) const {
    const uint32_t group = rank / kGroup;
    return within_[rank] + groups_[group] + tops_[group / kGroup];
  }

 private:
  static constexpr uint32_t kGroup = 32;
  static int64_t rounded(int64_t count) { return (count / kGroup + 1) * kGroup; }
  static int64_t tops(int64_t most) { return (most / (kGroup * kGroup) / 16 + 1) * 16; }
  static SKETCHFAST_INLINE void add_steps(uint16_t* __restrict to,
                                          const uint16_t* __restrict steps) {
    for (uint32_t i = 0; i < kGroup; ++i) to[i] = uint16_t(to[i] + steps[i]);
  }

  uint16_t *within_, *groups_;
  int32_t* tops_;
  uint16_t* steps_;
  int64_t most_;
  Int32V first_tops_;
};

// An anchor's triplets: sorts, compares, and leaves the weights of its columns.
template <typename real>
class AnchorCounter {
  using V = typename Simd<real>::V;
  using I = typename Simd<real>::I;
  using Index = typename Simd<real>::Index;
  static constexpr int64_t lanes = kLanes<real>;

 public:
  AnchorCounter(const Teacher& teacher, int64_t batch, double margin, int64_t tree_from)
      : batch_(batch),
        doubles_(teacher.dtype == Dtype::float64 ? batch : 0),
        margin_(real(margin)),
        uses_tree_(batch >= tree_from),
        arena_(bytes(batch, doubles_)),
        by_teacher_(arena_, batch),
        by_double_(arena_, doubles_),
        by_distance_(arena_, batch),
        tree_(arena_, batch),
        d_(arena_.take<real>(batch + lanes)),
        reach_(arena_.take<real>(batch + lanes)),
        key_(arena_.take<Index>(batch + lanes)),
        weight_(arena_.take<Index>(batch + lanes)),
        sorted_(arena_.take<real>(batch + lanes)),
        sorted_reach_(arena_.take<real>(batch + lanes)),
        rank_(arena_.take<int32_t>(batch)),
        nearer_(arena_.take<int32_t>(batch + lanes)),
        reaching_(arena_.take<int32_t>(batch + lanes)) {}

  // The sum of the anchor's terms without margin * active; weights [batch], 0 at the anchor.
  double count(const Teacher& teacher, int64_t anchor, const real* dist, int32_t* weights,
               int64_t& active) {
    const int64_t count = batch_ - 1;
    sort_by_teacher(teacher, anchor);
    const int32_t* column = by_teacher_.index;
    for (int64_t p = 0; p < count; ++p) {
      d_[p] = dist[column[p]];
      reach_[p] = d_[p] + margin_;
    }
    active = nans_        ? count_by_definition(count)
             : uses_tree_ ? count_by_tree(count)
                          : count_by_pairs(count);
    weights[anchor] = 0;
    double sum = 0;
    for (int64_t p = 0; p < count; ++p) {
      const Index weight = weight_[p];
      weights[column[p]] = int32_t(weight);
      // An idle infinite distance counts nothing; NaN stays to be seen.
      sum += weight ? double(weight) * double(d_[p]) : d_[p] != d_[p] ? double(d_[p]) : 0.0;
    }
    return sum;
  }

 private:
  using DistanceKey = std::conditional_t<sizeof(real) == 4, int32_t, int64_t>;

  static int64_t bytes(int64_t batch, int64_t doubles) {
    return Sorter<int32_t>::bytes(batch) + Sorter<int64_t>::bytes(doubles) +
           Sorter<DistanceKey>::bytes(batch) + RankTree::bytes(batch) +
           4 * Arena::bytes_of<real>(batch + lanes) + 2 * Arena::bytes_of<Index>(batch + lanes) +
           Arena::bytes_of<int32_t>(batch) + 2 * Arena::bytes_of<int32_t>(batch + lanes);
  }

  void sort_by_teacher(const Teacher& teacher, int64_t anchor) {
    int64_t filled = 0;
    nans_ = 0;
    const auto take = [&](int64_t j, float value) {
      nans_ += value != value;
      by_teacher_.keys[filled] = sortable(value);
      by_teacher_.index[filled++] = int32_t(j);
    };
    switch (teacher.dtype) {
      case Dtype::float16:
        each_teacher<uint16_t>(teacher, anchor, batch_, widen_float16, take);
        break;
      case Dtype::bfloat16:
        each_teacher<uint16_t>(teacher, anchor, batch_, widen_bfloat16, take);
        break;
      case Dtype::float32:
        each_teacher<float>(teacher, anchor, batch_, [](float value) { return value; }, take);
        break;
      case Dtype::float64:
        return sort_by_double(teacher, anchor);
    }
    by_teacher_.sort(filled);
  }

  // The sorted order of doubles, with the number of the run of equal ones for a key.
  void sort_by_double(const Teacher& teacher, int64_t anchor) {
    int64_t filled = 0;
    each_teacher<double>(
        teacher, anchor, batch_, [](double value) { return value; },
        [&](int64_t j, double value) {
          nans_ += value != value;
          by_double_.keys[filled] = sortable(value);
          by_double_.index[filled++] = int32_t(j);
        });
    by_double_.sort(filled);
    int32_t run = 0;
    for (int64_t p = 0; p < filled; ++p) {
      run += p > 0 && by_double_.keys[p] != by_double_.keys[p - 1];
      by_teacher_.keys[p] = run;
      by_teacher_.index[p] = by_double_.index[p];
    }
  }

  // --- with NaN, which has no place in an order: as if it tied with every column ---

  int64_t count_by_definition(int64_t count) {
    const int32_t* keys = by_teacher_.keys;
    const int64_t ordered = count - nans_;  // NaN sorts last
    int64_t active = 0;
    for (int64_t p = 0; p < count; ++p) {
      weight_[p] = 0;
      for (int64_t q = 0; q < count; ++q) {
        if (q == p) continue;
        const bool tied = p >= ordered || q >= ordered || keys[p] == keys[q];
        const int drawn = tied ? 1 : keys[p] < keys[q] ? 2 : 0;
        const int reaches = reach_[p] > d_[q], reached = reach_[q] > d_[p];
        weight_[p] += drawn * reaches - (2 - drawn) * reached;
        active += drawn * reaches;
      }
    }
    return active;
  }

  // --- pair by pair: a vector of columns against every other ---

  int64_t count_by_pairs(int64_t count) {
    const int32_t* keys = by_teacher_.keys;
    for (int64_t p = 0; p < count; ++p) key_[p] = keys[p];
    for (int64_t p = count; p < count + lanes; ++p) {  // beyond the end: reaches nothing
      d_[p] = std::numeric_limits<real>::infinity();
      reach_[p] = -std::numeric_limits<real>::infinity();
      key_[p] = 0;
    }
    I active = {};  // a lane's sum stays below B^2 / lanes
    for (int64_t first = 0; first < count; first += lanes) {
      const int64_t last = (first + lanes < count ? first + lanes : count) - 1;
      int64_t low = first, high = last + 1;  // the runs of equal teacher distances that it touches
      while (low > 0 && keys[low - 1] == keys[first]) --low;
      while (high < count && keys[high] == keys[last]) ++high;
      active += count_vector(first, low, high, count);
    }
    int64_t sum = 0;
    for (int64_t lane = 0; lane < lanes; ++lane) sum += active[lane];
    return sum;
  }

  I count_vector(int64_t first, int64_t low, int64_t high, int64_t count) {
    const V d = load<V>(d_ + first), reach = load<V>(reach_ + first);
    const I key = load<I>(key_ + first);
    I drawn = {}, pushed = {}, tied_drawn = {}, tied_pushed = {};
#pragma GCC unroll 4
    for (int64_t q = 0; q < low; ++q) count_where((V{} + reach_[q]) > d, pushed);
#pragma GCC unroll 4
    for (int64_t q = high; q < count; ++q) count_where(reach > (V{} + d_[q]), drawn);
    for (int64_t q = low; q < high; ++q) {
      const I reaches = reach > (V{} + d_[q]), reached = (V{} + reach_[q]) > d;
      const I other = I{} + key_[q];
      count_where(reaches & (key < other), drawn);
      count_where(reached & (key > other), pushed);
      count_where(reaches & (key == other), tied_drawn);  // of itself: once drawn, once pushed
      count_where(reached & (key == other), tied_pushed);
    }
    store(weight_ + first, 2 * (drawn - pushed) + tied_drawn - tied_pushed);
    const I itself = -(reach > d);
    return 2 * drawn + tied_drawn - itself;
  }

  // --- by ranks ---

  int64_t count_by_tree(int64_t count) {
    const int64_t numbers = rank_by_distance(count);
    bound_ranks(numbers);
    tree_.clear();
    int64_t active = 0;
    int32_t before = 0;  // columns in the tree
    const int32_t* keys = by_teacher_.keys;
    for (int64_t first = 0; first < count;) {
      int64_t end = first + 1;
      while (end < count && keys[end] == keys[first]) ++end;
      active += end == first + 1 ? count_one(first, before) : count_tied(first, end, before);
      first = end;
    }
    return active;
  }

  // rank_[p]: the place of d_[p] among all that are numbers, of which it gives the count; else -1.
  int64_t rank_by_distance(int64_t count) {
    int64_t numbers = 0;
    for (int64_t p = 0; p < count; ++p) {
      by_distance_.keys[numbers] = sortable(d_[p]);
      by_distance_.index[numbers] = int32_t(p);
      numbers += d_[p] == d_[p];
      rank_[p] = -1;
    }
    by_distance_.sort(numbers);
    const int32_t* index = by_distance_.index;
    for (int64_t r = 0; r < numbers; ++r) {
      rank_[index[r]] = int32_t(r);
      sorted_[r] = d_[index[r]];
      sorted_reach_[r] = sorted_[r] + margin_;
    }
    return numbers;
  }

  // By rank: nearer_[r] columns are nearer than the reach of r; of the columns, sorted by distance
  // and so by reach, those from reaching_[r] on reach beyond r.
  void bound_ranks(int64_t numbers) {
    fill_bounds(numbers, sorted_, sorted_reach_, nearer_, [](auto x, auto own) { return x < own; });
    fill_bounds(numbers, sorted_reach_, sorted_, reaching_,
                [](auto x, auto own) { return x <= own; });
  }

  // to[r] = how many of `sorted` come before own[r]; both ascend, so a vector of r goes through
  // few.
  template <typename Before>
  void fill_bounds(int64_t numbers, const real* sorted, real* own, int32_t* to, Before is_before) {
    for (int64_t p = numbers; p < numbers + lanes; ++p)
      own[p] = numbers ? own[numbers - 1] : real(0);
    int64_t next = 0;
    for (int64_t first = 0; first < numbers; first += lanes) {
      const V bound = load<V>(own + first);
      I passed = I{} + Index(next);
      for (; next < numbers; ++next) {
        count_where(is_before(V{} + sorted[next], bound), passed);
        if (!is_before(sorted[next], own[first + lanes - 1])) break;
      }
      for (int64_t lane = 0; lane < lanes; ++lane) to[first + lane] = int32_t(passed[lane]);
    }
  }

  // A column whose teacher distance no other has.
  int64_t count_one(int64_t p, int32_t& before) {
    const int32_t rank = rank_[p];
    weight_[p] = 0;
    if (rank < 0) return 0;
    const int32_t nearer = nearer_[rank], reaching = reaching_[rank];
    const int32_t drawn = nearer - tree_.below(nearer) - (rank < nearer);
    const int32_t pushed = before - tree_.below(reaching);
    tree_.add(rank);
    ++before;
    weight_[p] = 2 * (drawn - pushed);
    return 2 * int64_t(drawn);
  }

  // Columns of one teacher distance: among themselves each pair counts once in each order.
  int64_t count_tied(int64_t first, int64_t end, int32_t& before) {
    int64_t active = 0;
    const auto count_all = [&](auto count_column) {
      for (int64_t p = first; p < end; ++p)
        if (rank_[p] >= 0)
          count_column(weight_[p], rank_[p], nearer_[rank_[p]], reaching_[rank_[p]]);
        else
          weight_[p] = 0;
    };
    const auto add_counts = [&](Index& weight, int32_t nearer, int32_t reaching) {
      const int32_t drawn = nearer - tree_.below(nearer);
      weight += drawn - (before - tree_.below(reaching));
      active += drawn;
    };
    count_all([&](Index& weight, int32_t, int32_t nearer, int32_t reaching) {
      weight = 0;
      add_counts(weight, nearer, reaching);
    });
    for (int64_t p = first; p < end; ++p)
      if (rank_[p] >= 0) {
        tree_.add(rank_[p]);
        ++before;
      }
    count_all([&](Index& weight, int32_t rank, int32_t nearer, int32_t reaching) {
      add_counts(weight, nearer, reaching);
      active -= rank < nearer;  // itself, which counts as drawn and as pushed
    });
    return active;
  }

  int64_t batch_, doubles_;
  real margin_;
  bool uses_tree_;
  int64_t nans_ = 0;  // of the anchor's teacher distances
  Arena arena_;
  Sorter<int32_t> by_teacher_;
  Sorter<int64_t> by_double_;
  Sorter<DistanceKey> by_distance_;
  RankTree tree_;
  real *d_, *reach_;
  Index *key_, *weight_;
  real *sorted_, *sorted_reach_;
  int32_t *rank_, *nearer_, *reaching_;
};

// --- forward ------------------------------------------------------------------------------------

template <typename real>
int64_t block_bytes(const Embeddings& from) {
  return from.matrix ? 0 : Arena::bytes_of<real>(kBlockAnchors * padded_columns<real>(from.batch));
}

// Calls use(i, distances of anchor i), a block of anchors at a time.
template <typename real, typename Use>
void each_anchor(const Embeddings& from, const real* panels, int64_t begin, int64_t end, Use use) {
  const int64_t columns = padded_columns<real>(from.batch);
  Arena arena(block_bytes<real>(from));
  real* block = from.matrix ? nullptr : arena.take<real>(kBlockAnchors * columns);
  for (int64_t first = begin; first < end; first += kBlockAnchors) {
    const int64_t anchors = end - first < kBlockAnchors ? end - first : kBlockAnchors;
    if (block) block_distances(from, panels, first, anchors, columns, block);
    for (int64_t a = 0; a < anchors; ++a)
      use(first + a, block ? block + a * columns
                           : static_cast<const real*>(from.matrix) + (first + a) * from.batch);
  }
}

template <typename real>
void rank_all_of(const Embeddings& from, const real* panels, const Teacher& teacher,
                 int64_t tree_from, int32_t* weights, double* losses, int64_t begin, int64_t end) {
  AnchorCounter<real> counter(teacher, from.batch, from.margin, tree_from);
  each_anchor(from, panels, begin, end, [&](int64_t i, const real* dist) {
    int64_t active = 0;
    const double sum = counter.count(teacher, i, dist, weights + i * from.batch, active);
    losses[i] = sum + from.margin * double(active);
  });
}

// The distance of one pair, from the matrix or from the rows.
template <typename real>
real pair_distance(const Embeddings& from, int64_t i, int64_t j) {
  if (from.matrix) return static_cast<const real*>(from.matrix)[i * from.batch + j];
  return distance(static_cast<const real*>(from.query) + i * from.dimensions,
                  static_cast<const real*>(from.gallery) + j * from.dimensions, from.dimensions,
                  from.squared);
}

inline double teacher_distance(const Teacher& teacher, int64_t i, int64_t j) {
  return element(
      teacher.data, teacher.dtype,
      row_of(teacher, i) * teacher.row_stride + row_of(teacher, j) * teacher.column_stride);
}

// `active` [batch, samples] or `weights` [batch, batch]; the other is null.
template <typename real>
void rank_samples_of(const Embeddings& from, const Teacher& teacher, uint64_t seed, int64_t samples,
                     int8_t* active, int32_t* weights, double* losses, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    double sum = 0;
    if (weights) fill(weights + i * from.batch, from.batch, int32_t(0));
    for (int64_t s = 0; s < samples; ++s) {
      const Pair pair = sampled_pair(seed, i, s, from.batch);
      const bool in_order =
          teacher_distance(teacher, i, pair.j) <= teacher_distance(teacher, i, pair.k);
      const int64_t near = in_order ? pair.j : pair.k, far = in_order ? pair.k : pair.j;
      const real drawn = pair_distance<real>(from, i, near),
                 pushed = pair_distance<real>(from, i, far);
      const bool counts = is_active(drawn, pushed, real(from.margin));
      const double term = from.margin + double(drawn) - double(pushed);
      if (counts || term != term) sum += term;
      if (active) active[i * samples + s] = counts ? (in_order ? 1 : -1) : 0;
      if (weights && counts) {
        ++weights[i * from.batch + near];
        --weights[i * from.batch + far];
      }
    }
    losses[i] = sum;
  }
}

// Doubles and long integers from memory, as many as a vector of doubles has.
typedef float HalfFloatV __attribute__((vector_size(kVectorBytes / 2)));
typedef int32_t HalfInt32V __attribute__((vector_size(kVectorBytes / 2)));
SKETCHFAST_INLINE DoubleV load_doubles(const double* from) { return load<DoubleV>(from); }
SKETCHFAST_INLINE DoubleV load_doubles(const float* from) {
  return __builtin_convertvector(load<HalfFloatV>(from), DoubleV);
}
SKETCHFAST_INLINE Int64V load_integers(const int32_t* from) {
  return __builtin_convertvector(load<HalfInt32V>(from), Int64V);
}

// One anchor of the loss of matched pairs. Rows of distances are padded to whole vectors.
template <typename real>
class PairAnchor {
  using V = typename Simd<real>::V;
  static constexpr int64_t lanes = kLanes<real>;

 public:
  PairAnchor(const Embeddings& from, const Pairs& pairs)
      : pairs_(pairs),
        batch_(from.batch),
        margin_(from.margin),
        arena_(2 * Arena::bytes_of<int32_t>(padded_columns<float>(from.batch))),
        allowed_(arena_.take<int32_t>(padded_columns<float>(from.batch))),
        weights_(arena_.take<int32_t>(padded_columns<float>(from.batch))) {}

  // The loss over the anchor's triplets; `state` is its row of weights, or its one negative.
  double loss(int64_t anchor, const real* dist, int32_t* state, int64_t& considered) {
    const int64_t negatives = allow(anchor);
    const real own = dist[anchor];
    if (pairs_.mining == Mining::all) {
      considered = negatives;
      return all(anchor, own, dist, state);
    }
    const int64_t chosen = choose(anchor, negatives, own, dist);
    considered = chosen >= 0;
    *state = -1;
    if (chosen < 0) return 0;
    const double term = margin_ + double(own) - double(dist[chosen]);
    if (!is_active(own, dist[chosen], real(margin_))) return term != term ? term : 0;
    *state = int32_t(chosen);
    return term;
  }

 private:
  // allowed_: -1 where the column is a negative, else 0; gives how many are.
  int64_t allow(int64_t anchor) {
    const int32_t* labels = pairs_.labels;
    fill(allowed_, padded_columns<float>(batch_), int32_t(0));
    if (labels)
      for (int64_t k = 0; k < batch_; ++k) allowed_[k] = -(labels[k] != labels[anchor]);
    else
      for (int64_t k = 0; k < batch_; ++k) allowed_[k] = -(k != anchor);
    int32_t negatives = 0;
    for (int64_t k = 0; k < batch_; ++k) negatives -= allowed_[k];
    return negatives;
  }

  double all(int64_t anchor, real own, const real* dist, int32_t* weights) {
    const DoubleV reach = DoubleV{} + double(own + real(margin_));
    const DoubleV base = DoubleV{} + (margin_ + double(own));
    DoubleV sum = {};
    Int64V active = {};
    for (int64_t k = 0; k < batch_; k += kLanes<double>) {
      const DoubleV d = load_doubles(dist + k), term = base - d;
      const Int64V allowed = load_integers(allowed_ + k);
      const Int64V counts = allowed & (reach > d);
      sum += select(counts | (allowed & (term != term)), term, DoubleV{});
      active -= counts;
      store(weights_ + k, __builtin_convertvector(counts, HalfInt32V));
    }
    std::memcpy(weights, weights_, batch_ * sizeof(int32_t));
    weights[anchor] = 0;
    for (int64_t lane = 0; lane < kLanes<double>; ++lane) weights[anchor] += int32_t(active[lane]);
    return sum_of_lanes(sum);
  }

  int64_t choose(int64_t anchor, int64_t negatives, real own, const real* dist) {
    if (negatives == 0) return -1;
    if (pairs_.mining == Mining::random)
      return nth_allowed(below(philox(pairs_.seed, uint32_t(anchor), 0).word[0], negatives));
    if (pairs_.mining == Mining::semihard) {
      const real reach = own + real(margin_);
      for (int64_t k = 0; k < batch_; ++k)
        allowed_[k] = dist[k] > own && reach > dist[k] ? allowed_[k] : 0;
    }
    return least_allowed(dist);
  }

  int64_t nth_allowed(int64_t n) const {
    for (int64_t k = 0; k < batch_; ++k)
      if (allowed_[k] && n-- == 0) return k;
    return -1;
  }

  // The lowest column of the least distance, of those allowed; where all are infinite or NaN, the
  // first allowed one. -1: none is allowed.
  int64_t least_allowed(const real* dist) const {
    constexpr real infinity = std::numeric_limits<real>::infinity();
    real least = infinity;
    for (int64_t k = 0; k < batch_; ++k) {
      const real candidate = allowed_[k] ? dist[k] : infinity;
      least = candidate < least ? candidate : least;
    }
    for (int64_t k = 0; k < batch_; ++k)
      if (allowed_[k] && (dist[k] == least || least == infinity)) return k;
    return -1;
  }

  const Pairs& pairs_;
  int64_t batch_;
  double margin_;
  Arena arena_;
  int32_t *allowed_, *weights_;
};

template <typename real>
void pairs_of(const Embeddings& from, const real* panels, const Pairs& pairs, int32_t* state,
              int64_t* considered, double* losses, int64_t begin, int64_t end) {
  PairAnchor<real> anchor(from, pairs);
  const int64_t stride = pairs.mining == Mining::all ? from.batch : 1;
  each_anchor(from, panels, begin, end, [&](int64_t i, const real* dist) {
    losses[i] = anchor.loss(i, dist, state + i * stride, considered[i]);
  });
}

// --- backward -----------------------------------------------------------------------------------

constexpr int kAnchorsAtOnce = 4, kVectorsAtOnce = 2;
constexpr int64_t kBlockRows = 64;  // gallery rows that stay in the nearest cache

// Adds pull * (query - gallery) of some anchors and gallery rows, over a few vectors of dimensions.
template <typename real>
void add_gradients(const real* query, const real* gallery, int64_t stride, const real* pulls,
                   int64_t pull_stride, int64_t rows, real* grad_query, real* grad_gallery) {
  using V = typename Simd<real>::V;
  constexpr int64_t lanes = kLanes<real>;
  V point[kAnchorsAtOnce][kVectorsAtOnce], sum[kAnchorsAtOnce][kVectorsAtOnce] = {};
  for (int a = 0; a < kAnchorsAtOnce; ++a)
    for (int v = 0; v < kVectorsAtOnce; ++v) point[a][v] = load<V>(query + a * stride + v * lanes);
  for (int64_t j = 0; j < rows; ++j) {
    V row[kVectorsAtOnce], grad[kVectorsAtOnce];
#pragma GCC unroll 2
    for (int v = 0; v < kVectorsAtOnce; ++v) {
      row[v] = load<V>(gallery + j * stride + v * lanes);
      grad[v] = load<V>(grad_gallery + j * stride + v * lanes);
    }
#pragma GCC unroll 4
    for (int a = 0; a < kAnchorsAtOnce; ++a) {
      const V strength = V{} + pulls[a * pull_stride + j];
#pragma GCC unroll 2
      for (int v = 0; v < kVectorsAtOnce; ++v) {
        const V gap = point[a][v] - row[v];
        sum[a][v] += strength * gap;
        grad[v] -= strength * gap;
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectorsAtOnce; ++v) store(grad_gallery + j * stride + v * lanes, grad[v]);
  }
  for (int a = 0; a < kAnchorsAtOnce; ++a)
    for (int v = 0; v < kVectorsAtOnce; ++v) {
      real* to = grad_query + a * stride + v * lanes;
      store(to, load<V>(to) + sum[a][v]);
    }
}

// The gradients of a range of anchors; `part` [batch, padded dimensions] is its share of gallery's.
template <typename real>
class WeightedGrad {
  static constexpr int64_t lanes = kLanes<real>, chunk = kVectorsAtOnce * lanes;

 public:
  static int64_t padded(int64_t dimensions) { return (dimensions + chunk - 1) / chunk * chunk; }

  WeightedGrad(const Embeddings& from, const int32_t* weights, double scale)
      : from_(from),
        weights_(weights),
        scale_(real(scale)),
        columns_(padded_columns<real>(from.batch)),
        stride_(padded(from.dimensions)),
        arena_(Arena::bytes_of<real>(kBlockAnchors * columns_) +
               2 * Arena::bytes_of<real>(kBlockAnchors * stride_) +
               Arena::bytes_of<real>(kBlockRows * stride_)),
        pulls_(arena_.take<real>(kBlockAnchors * columns_)),
        query_(arena_.take<real>(kBlockAnchors * stride_)),
        grad_query_(arena_.take<real>(kBlockAnchors * stride_)),
        gallery_(arena_.take<real>(kBlockRows * stride_)) {}

  void run(const real* panels, int64_t begin, int64_t end, real* grad_query, real* part) {
    const int64_t dimensions = from_.dimensions;
    fill(part, from_.batch * stride_, real(0));
    for (int64_t first = begin; first < end; first += kBlockAnchors) {
      const int64_t anchors = end - first < kBlockAnchors ? end - first : kBlockAnchors;
      block_distances(from_, panels, first, anchors, columns_, pulls_);
      for (int64_t a = 0; a < kBlockAnchors; ++a) weigh(first + a, a, a < anchors);
      pad_rows(static_cast<const real*>(from_.query) + first * dimensions, anchors, kBlockAnchors,
               query_);
      fill(grad_query_, kBlockAnchors * stride_, real(0));
      for (int64_t j = 0; j < from_.batch; j += kBlockRows) add_block(j, anchors, part);
      for (int64_t a = 0; a < anchors; ++a)
        std::memcpy(grad_query + (first + a) * dimensions, grad_query_ + a * stride_,
                    dimensions * sizeof(real));
    }
  }

 private:
  // Distances of an anchor become what each pulls by.
  void weigh(int64_t anchor, int64_t a, bool exists) {
    real* pulls = pulls_ + a * columns_;
    if (!exists) return fill(pulls, columns_, real(0));
    const int32_t* weights = weights_ + anchor * from_.batch;
    for (int64_t j = 0; j < from_.batch; ++j) {
      const real strength = scale_ * real(weights[j]);
      const real over = from_.squared ? real(0.5) : pulls[j];
      pulls[j] = weights[j] == 0 || over == 0 ? real(0) : strength / over;
    }
  }

  void pad_rows(const real* rows, int64_t count, int64_t most, real* to) const {
    fill(to, most * stride_, real(0));
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(to + i * stride_, rows + i * from_.dimensions, from_.dimensions * sizeof(real));
  }

  void add_block(int64_t first, int64_t anchors, real* part) {
    const int64_t rows = from_.batch - first < kBlockRows ? from_.batch - first : kBlockRows;
    const real* gallery = static_cast<const real*>(from_.gallery) + first * from_.dimensions;
    if (stride_ != from_.dimensions) {
      pad_rows(gallery, rows, rows, gallery_);
      gallery = gallery_;
    }
    for (int64_t d = 0; d < stride_; d += chunk)
      for (int64_t a = 0; a < anchors; a += kAnchorsAtOnce)
        add_gradients(query_ + a * stride_ + d, gallery + d, stride_, pulls_ + a * columns_ + first,
                      columns_, rows, grad_query_ + a * stride_ + d, part + first * stride_ + d);
  }

  const Embeddings& from_;
  const int32_t* weights_;
  real scale_;
  int64_t columns_, stride_;
  Arena arena_;
  real *pulls_, *query_, *grad_query_, *gallery_;
};

// to [rows, dimensions] = the sum of the parts, in their order.
template <typename real>
void sum_parts_of(const real* parts, int64_t count, int64_t batch, int64_t dimensions, real* to,
                  int64_t begin, int64_t end) {
  const int64_t stride = WeightedGrad<real>::padded(dimensions);
  for (int64_t j = begin; j < end; ++j)
    for (int64_t d = 0; d < dimensions; ++d) {
      real sum = 0;
      for (int64_t m = 0; m < count; ++m) sum += parts[(m * batch + j) * stride + d];
      to[j * dimensions + d] = sum;
    }
}

// Calls use(near, far) for each active triplet of anchor i that was listed.
template <typename Use>
void each_listed(const Listed& listed, int64_t batch, int64_t i, Use use) {
  if (listed.chosen) {
    const int64_t k = listed.chosen[i];
    if (k >= 0 && k < batch) use(i, k);
    return;
  }
  for (int64_t s = 0; s < listed.samples; ++s) {
    const int8_t order = listed.active[i * listed.samples + s];
    if (order == 0) continue;
    const Pair pair = sampled_pair(listed.seed, i, s, batch);
    order > 0 ? use(pair.j, pair.k) : use(pair.k, pair.j);
  }
}

// to += weight times the gradient of the distance of x and y to x.
template <typename real>
void add_pull(const Embeddings& from, const real* x, const real* y, real weight,
              real* __restrict to) {
  const real dist = from.squared ? real(0.5) : distance(x, y, from.dimensions, false);
  if (dist == 0) return;
  const real strength = weight / dist;
  for (int64_t d = 0; d < from.dimensions; ++d) to[d] += strength * (x[d] - y[d]);
}

template <typename real>
void listed_query_grad_of(const Embeddings& from, const Listed& listed, real scale,
                          real* grad_query, int64_t begin, int64_t end) {
  const real *query = static_cast<const real*>(from.query),
             *gallery = static_cast<const real*>(from.gallery);
  const int64_t size = from.dimensions;
  for (int64_t i = begin; i < end; ++i) {
    real* to = grad_query + i * size;
    fill(to, size, real(0));
    each_listed(listed, from.batch, i, [&](int64_t near, int64_t far) {
      add_pull(from, query + i * size, gallery + near * size, scale, to);
      add_pull(from, query + i * size, gallery + far * size, -scale, to);
    });
  }
}

// Every range goes through all triplets and takes those that touch its rows: their order, and so
// the sums, do not depend on the ranges.
template <typename real>
void listed_gallery_grad_of(const Embeddings& from, const Listed& listed, real scale,
                            real* grad_gallery, int64_t begin, int64_t end) {
  const real *query = static_cast<const real*>(from.query),
             *gallery = static_cast<const real*>(from.gallery);
  const int64_t size = from.dimensions;
  fill(grad_gallery + begin * size, (end - begin) * size, real(0));
  for (int64_t i = 0; i < from.batch; ++i) {
    const auto add = [&](int64_t j, real weight) {
      if (j >= begin && j < end)
        add_pull(from, gallery + j * size, query + i * size, weight, grad_gallery + j * size);
    };
    each_listed(listed, from.batch, i, [&](int64_t near, int64_t far) {
      add(near, scale);
      add(far, -scale);
    });
  }
}

// --- the table ----------------------------------------------------------------------------------

template <typename Work>
void in_precision(const Embeddings& from, Work work) {
  FlushSubnormals flush;
  from.is_double ? work(double()) : work(float());
}

int64_t panel_count(const Embeddings& from) {
  int64_t count = 0;
  in_precision(from, [&](auto real) {
    count = padded_columns<decltype(real)>(from.batch) / kLanes<decltype(real)>;
  });
  return count;
}

int64_t panel_bytes(const Embeddings& from) {
  return panel_count(from) * from.dimensions * kVectorBytes;
}

void pack(const Embeddings& from, void* panels, int64_t begin, int64_t end) {
  in_precision(from, [&](auto real) {
    pack_panels(from, static_cast<decltype(real)*>(panels), begin, end);
  });
}

void rank_all(const Embeddings& from, const void* panels, const Teacher& teacher, int64_t tree_from,
              int32_t* weights, double* losses, int64_t begin, int64_t end) {
  in_precision(from, [&](auto real) {
    rank_all_of(from, static_cast<const decltype(real)*>(panels), teacher, tree_from, weights,
                losses, begin, end);
  });
}

void rank_samples(const Embeddings& from, const Teacher& teacher, uint64_t seed, int64_t samples,
                  int8_t* active, int32_t* weights, double* losses, int64_t begin, int64_t end) {
  in_precision(from, [&](auto real) {
    rank_samples_of<decltype(real)>(from, teacher, seed, samples, active, weights, losses, begin,
                                    end);
  });
}

void pairs(const Embeddings& from, const void* panels, const Pairs& settings, int32_t* state,
           int64_t* considered, double* losses, int64_t begin, int64_t end) {
  in_precision(from, [&](auto real) {
    pairs_of(from, static_cast<const decltype(real)*>(panels), settings, state, considered, losses,
             begin, end);
  });
}

int64_t part_bytes(const Embeddings& from) {
  int64_t bytes = 0;
  in_precision(from, [&](auto real) {
    bytes = from.batch * WeightedGrad<decltype(real)>::padded(from.dimensions) * sizeof(real);
  });
  return bytes;
}

void weighted_grad(const Embeddings& from, const void* panels, const int32_t* weights, double scale,
                   void* grad_query, void* part, int64_t begin, int64_t end) {
  in_precision(from, [&](auto real) {
    using Real = decltype(real);
    WeightedGrad<Real>(from, weights, scale)
        .run(static_cast<const Real*>(panels), begin, end, static_cast<Real*>(grad_query),
             static_cast<Real*>(part));
  });
}

void sum_parts(const Embeddings& from, const void* parts, int64_t count, void* to, int64_t begin,
               int64_t end) {
  in_precision(from, [&](auto real) {
    using Real = decltype(real);
    sum_parts_of(static_cast<const Real*>(parts), count, from.batch, from.dimensions,
                 static_cast<Real*>(to), begin, end);
  });
}

void listed_query_grad(const Embeddings& from, const Listed& listed, double scale, void* grad_query,
                       int64_t begin, int64_t end) {
  in_precision(from, [&](auto real) {
    using Real = decltype(real);
    listed_query_grad_of(from, listed, Real(scale), static_cast<Real*>(grad_query), begin, end);
  });
}

void listed_gallery_grad(const Embeddings& from, const Listed& listed, double scale,
                         void* grad_gallery, int64_t begin, int64_t end) {
  in_precision(from, [&](auto real) {
    using Real = decltype(real);
    listed_gallery_grad_of(from, listed, Real(scale), static_cast<Real*>(grad_gallery), begin, end);
  });
}

}  // namespace SKETCHFAST_ISA

extern const Kernels SKETCHFAST_KERNELS_OF(SKETCHFAST_ISA) = {
    panel_count, panel_bytes,   pack,      rank_all,          rank_samples,       pairs,
    part_bytes,  weighted_grad, sum_parts, listed_query_grad, listed_gallery_grad};

}  // namespace triplet_cpu
}  // namespace sketchfast

// --- torch -------------------------------------------------------------------------------------

#if defined(SKETCHFAST_ISA_baseline)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "../check.h"
#include "dtype_of.h"

namespace sketchfast {
namespace triplet_cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;
using torch::stable::new_empty;

constexpr int64_t kLeastWork = 1 << 17;  // multiplications or comparisons worth a thread of its own

const Kernels& kernels() { SKETCHFAST_RETURN_KERNELS_OF_CHOSEN_ISA }

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data_of(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// --- how work is shared ---

template <typename Work>
void over_range(int64_t count, int64_t work_each, Work work) {
  const int64_t grain = std::max<int64_t>(1, kLeastWork / std::max<int64_t>(1, work_each));
  torch::stable::parallel_for(0, count, grain, work);
}

// What an anchor costs: its distances, and its columns against one another.
int64_t anchor_work(const Embeddings& from) {
  return from.batch * (from.dimensions / 4 + std::min<int64_t>(from.batch, 256) / 4 + 8);
}

// --- arguments ---

ScalarType compute_type(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, name,
        " must be float32 or float64, got scalar type ", static_cast<int>(type));
  return type;
}

Embeddings embeddings_of(const Tensor& query, const Tensor& gallery, double margin, bool squared) {
  check(query.dim() == 2 && query.size(1) >= 1, "query must have shape [B, D >= 1], got ",
        shape_of(query));
  const int64_t batch = query.size(0), dimensions = query.size(1);
  check(batch <= std::numeric_limits<int32_t>::max(), "query must have fewer than 2^31 rows, got ",
        batch);
  const ScalarType type = compute_type("query", query);
  check_tensor("query", query, type, {batch, dimensions});
  check_tensor("gallery", gallery, type, {batch, dimensions});
  return {query.const_data_ptr(),
          gallery.const_data_ptr(),
          nullptr,
          batch,
          dimensions,
          squared,
          type == ScalarType::Double,
          margin};
}

Embeddings matrix_of(const Tensor& dist, double margin) {
  check(dist.dim() == 2, "dist must have shape [B, B], got ", shape_of(dist));
  const int64_t batch = dist.size(0);
  check(batch <= std::numeric_limits<int32_t>::max(), "dist must have fewer than 2^31 rows, got ",
        batch);
  const ScalarType type = compute_type("dist", dist);
  check_tensor("dist", dist, type, {batch, batch});
  return {nullptr, nullptr, dist.const_data_ptr(),      batch,
          1,       false,   type == ScalarType::Double, margin};
}

Teacher teacher_of(const Tensor& teacher, const OptionalTensor& indices, int64_t batch) {
  check(teacher.dim() == 2 && teacher.size(0) == teacher.size(1),
        "teacher must have shape [N, N], got ", shape_of(teacher));
  const int64_t rows = teacher.size(0);
  if (indices) {
    check_tensor("indices", *indices, ScalarType::Long, {batch});
    check(rows > 0 || batch == 0, "teacher must have at least one row, got ", shape_of(teacher));
  } else {
    check(rows == batch, "teacher must have shape [", batch, ", ", batch, "], got ",
          shape_of(teacher));
  }
  return {teacher.const_data_ptr(),
          dtype_of("teacher", teacher.scalar_type()),
          rows,
          teacher.stride(0),
          teacher.stride(1),
          indices ? data_of<int64_t>(*indices) : nullptr};
}

uint64_t seed_of(const Tensor& seed) {
  check_tensor("seed", seed, ScalarType::Long, {});
  return static_cast<uint64_t>(*data_of<int64_t>(seed));
}

double scale_of(const Tensor& scale, const Embeddings& from) {
  check_tensor("scale", scale, from.is_double ? ScalarType::Double : ScalarType::Float, {});
  return element(scale.const_data_ptr(), dtype_of("scale", scale.scalar_type()), 0);
}

// --- steps ---

Tensor pack_gallery(const Tensor& gallery, const Embeddings& from) {
  Tensor panels = new_empty(gallery, {kernels().panel_bytes(from)}, ScalarType::Byte);
  void* to = panels.mutable_data_ptr();
  over_range(kernels().panel_count(from), 16 * from.dimensions,
             [&](int64_t begin, int64_t end) { kernels().pack(from, to, begin, end); });
  return panels;
}

// The mean, in the order of the anchors.
Tensor mean_of(const Tensor& like, const Tensor& losses, double count) {
  const double* terms = data_of<double>(losses);
  double sum = 0;
  for (int64_t i = 0, size = losses.numel(); i < size; ++i) sum += terms[i];
  Tensor loss = new_empty(like, {}, like.scalar_type());
  const double mean = count > 0 ? sum / count : 0;  // nothing to look at: not even NaN
  store_elements(loss.mutable_data_ptr(), dtype_of("loss", like.scalar_type()), 0, &mean, 1);
  return loss;
}

double triplet_count(int64_t batch) {
  return batch < 3 ? 0.0 : double(batch) * double(batch - 1) * double(batch - 2);
}

// --- ops ---

std::tuple<Tensor, Tensor> rank_all_triplets(const Tensor& like, const Embeddings& from,
                                             const Tensor* gallery, const Teacher& teacher,
                                             int64_t tree_from) {
  Tensor weights = new_empty(like, {from.batch, from.batch}, ScalarType::Int);
  Tensor losses = new_empty(like, {from.batch}, ScalarType::Double);
  const bool packs = gallery && from.batch > 0;
  const Tensor panels = packs ? pack_gallery(*gallery, from) : losses;
  const void* packed = packs ? panels.const_data_ptr() : nullptr;
  int32_t* to = mutable_data_of<int32_t>(weights);
  double* to_losses = mutable_data_of<double>(losses);
  over_range(from.batch, anchor_work(from), [&](int64_t begin, int64_t end) {
    kernels().rank_all(from, packed, teacher, tree_from, to, to_losses, begin, end);
  });
  return {mean_of(like, losses, triplet_count(from.batch)), weights};
}

std::tuple<Tensor, Tensor> rank_sampled_triplets(const Tensor& like, const Embeddings& from,
                                                 const Teacher& teacher, int64_t samples,
                                                 uint64_t seed, bool as_weights) {
  check(samples >= 1, "samples must be at least 1, got ", samples);
  Tensor state = as_weights ? new_empty(like, {from.batch, from.batch}, ScalarType::Int)
                            : new_empty(like, {from.batch, samples}, ScalarType::Char);
  Tensor losses = new_empty(like, {from.batch}, ScalarType::Double);
  int8_t* active = as_weights ? nullptr : mutable_data_of<int8_t>(state);
  int32_t* weights = as_weights ? mutable_data_of<int32_t>(state) : nullptr;
  double* to_losses = mutable_data_of<double>(losses);
  const int64_t drawn = from.batch < 3 ? 0 : samples;
  const int64_t work = drawn * (2 * from.dimensions / 4 + 64) + (as_weights ? from.batch : 0);
  over_range(from.batch, work, [&](int64_t begin, int64_t end) {
    kernels().rank_samples(from, teacher, seed, drawn, active, weights, to_losses, begin, end);
  });
  if (drawn == 0 && active) std::fill(active, active + from.batch * samples, int8_t(0));
  return {mean_of(like, losses, double(from.batch) * double(drawn)), state};
}

std::tuple<Tensor, Tensor> triplet_ranking_fwd(Tensor query, Tensor gallery, Tensor teacher,
                                               OptionalTensor indices, double margin, bool squared,
                                               int64_t tree_from) {
  const Embeddings from = embeddings_of(query, gallery, margin, squared);
  return rank_all_triplets(query, from, &gallery, teacher_of(teacher, indices, from.batch),
                           tree_from);
}

std::tuple<Tensor, Tensor> triplet_sampled_fwd(Tensor query, Tensor gallery, Tensor teacher,
                                               OptionalTensor indices, double margin, bool squared,
                                               int64_t samples, Tensor seed) {
  const Embeddings from = embeddings_of(query, gallery, margin, squared);
  return rank_sampled_triplets(query, from, teacher_of(teacher, indices, from.batch), samples,
                               seed_of(seed), false);
}

std::tuple<Tensor, Tensor> triplet_matrix_fwd(Tensor dist, Tensor teacher, OptionalTensor indices,
                                              double margin, int64_t samples, OptionalTensor seed,
                                              int64_t tree_from) {
  const Embeddings from = matrix_of(dist, margin);
  const Teacher photos = teacher_of(teacher, indices, from.batch);
  if (samples == 0) return rank_all_triplets(dist, from, nullptr, photos, tree_from);
  check(seed.has_value(), "seed must be given where samples is, got none");
  return rank_sampled_triplets(dist, from, photos, samples, seed_of(*seed), true);
}

Mining mining_of(const std::string& name) {
  static const std::map<std::string, Mining> minings = {{"all", Mining::all},
                                                        {"hardest", Mining::hardest},
                                                        {"semihard", Mining::semihard},
                                                        {"random", Mining::random}};
  const auto found = minings.find(name);
  check(found != minings.end(), "mining must be all, hardest, semihard or random, got ", name);
  return found->second;
}

// Labels by number in the order of their size: lanes compare 32 bits.
std::vector<int32_t> number_labels(const Tensor& labels, int64_t batch) {
  check_tensor("labels", labels, ScalarType::Long, {batch});
  const int64_t* values = data_of<int64_t>(labels);
  std::vector<int64_t> sorted(values, values + batch);
  std::sort(sorted.begin(), sorted.end());
  std::vector<int32_t> numbers(batch);
  for (int64_t i = 0; i < batch; ++i)
    numbers[i] =
        int32_t(std::lower_bound(sorted.begin(), sorted.end(), values[i]) - sorted.begin());
  return numbers;
}

std::tuple<Tensor, Tensor, Tensor> triplet_pairs_fwd(Tensor query, Tensor gallery,
                                                     OptionalTensor labels, double margin,
                                                     bool squared, std::string mining,
                                                     OptionalTensor seed) {
  const Embeddings from = embeddings_of(query, gallery, margin, squared);
  const int64_t batch = from.batch;
  Pairs settings{nullptr, mining_of(mining), 0};
  std::vector<int32_t> numbers;
  if (labels) {
    numbers = number_labels(*labels, batch);
    settings.labels = numbers.data();
  }
  const bool all = settings.mining == Mining::all;
  if (settings.mining == Mining::random) {
    check(seed.has_value(), "seed must be given for mining random, got none");
    settings.seed = seed_of(*seed);
  }
  Tensor state = all ? new_empty(query, {batch, batch}, ScalarType::Int)
                     : new_empty(query, {batch}, ScalarType::Int);
  Tensor losses = new_empty(query, {batch}, ScalarType::Double);
  Tensor counts = new_empty(query, {batch}, ScalarType::Long);
  Tensor considered = new_empty(query, {}, ScalarType::Long);
  const Tensor panels = batch > 0 ? pack_gallery(gallery, from) : losses;
  int32_t* to_state = mutable_data_of<int32_t>(state);
  int64_t* to_counts = mutable_data_of<int64_t>(counts);
  double* to_losses = mutable_data_of<double>(losses);
  over_range(batch, batch * (from.dimensions / 4 + 4), [&](int64_t begin, int64_t end) {
    kernels().pairs(from, panels.const_data_ptr(), settings, to_state, to_counts, to_losses, begin,
                    end);
  });
  int64_t total = 0;
  for (int64_t i = 0; i < batch; ++i) total += to_counts[i];
  *mutable_data_of<int64_t>(considered) = total;
  return {mean_of(query, losses, double(total)), state, considered};
}

std::tuple<Tensor, Tensor> triplet_embedding_bwd(Tensor scale, Tensor weights, Tensor query,
                                                 Tensor gallery, bool squared) {
  const Embeddings from = embeddings_of(query, gallery, 0.0, squared);
  const int64_t batch = from.batch;
  check_tensor("weights", weights, ScalarType::Int, {batch, batch});
  const double strength = scale_of(scale, from);
  Tensor grad_query = new_empty(query, {batch, from.dimensions}, query.scalar_type());
  Tensor grad_gallery = new_empty(query, {batch, from.dimensions}, query.scalar_type());
  if (batch == 0) return {grad_query, grad_gallery};
  // Each thread sums its anchors' pulls on the gallery apart; the parts are added in order.
  const int64_t work = batch * batch * from.dimensions / 4;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t members = std::max<int64_t>(1, std::min<int64_t>(threads, work / kLeastWork));
  const int64_t bytes = kernels().part_bytes(from);
  Tensor parts = new_empty(query, {members * bytes}, ScalarType::Byte);
  const Tensor panels = pack_gallery(gallery, from);
  char* to_parts = mutable_data_of<char>(parts);
  void *to_query = grad_query.mutable_data_ptr(), *to_gallery = grad_gallery.mutable_data_ptr();
  torch::stable::parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      kernels().weighted_grad(from, panels.const_data_ptr(), data_of<int32_t>(weights), strength,
                              to_query, to_parts + m * bytes, m * batch / members,
                              (m + 1) * batch / members);
  });
  over_range(batch, members * from.dimensions, [&](int64_t begin, int64_t end) {
    kernels().sum_parts(from, to_parts, members, to_gallery, begin, end);
  });
  return {grad_query, grad_gallery};
}

std::tuple<Tensor, Tensor> listed_bwd(const Tensor& like, const Embeddings& from,
                                      const Listed& listed, double scale) {
  Tensor grad_query = new_empty(like, {from.batch, from.dimensions}, like.scalar_type());
  Tensor grad_gallery = new_empty(like, {from.batch, from.dimensions}, like.scalar_type());
  void *to_query = grad_query.mutable_data_ptr(), *to_gallery = grad_gallery.mutable_data_ptr();
  const int64_t work = listed.samples * from.dimensions;
  over_range(from.batch, work, [&](int64_t begin, int64_t end) {
    kernels().listed_query_grad(from, listed, scale, to_query, begin, end);
  });
  over_range(from.batch, work, [&](int64_t begin, int64_t end) {
    kernels().listed_gallery_grad(from, listed, scale, to_gallery, begin, end);
  });
  return {grad_query, grad_gallery};
}

std::tuple<Tensor, Tensor> triplet_sampled_bwd(Tensor scale, Tensor active, Tensor seed,
                                               Tensor query, Tensor gallery, bool squared) {
  const Embeddings from = embeddings_of(query, gallery, 0.0, squared);
  check(active.dim() == 2, "active must have shape [B, samples], got ", shape_of(active));
  const int64_t samples = active.size(1);
  check_tensor("active", active, ScalarType::Char, {from.batch, samples});
  const int64_t drawn = from.batch < 3 ? 0 : samples;  // fewer rows have no triplets
  // No triplets are listed where none exist: the rows must still be written.
  const Listed listed{drawn ? data_of<int8_t>(active) : nullptr, seed_of(seed), drawn, nullptr};
  return listed_bwd(query, from, listed, scale_of(scale, from));
}

std::tuple<Tensor, Tensor> triplet_chosen_bwd(Tensor scale, Tensor chosen, Tensor query,
                                              Tensor gallery, bool squared) {
  const Embeddings from = embeddings_of(query, gallery, 0.0, squared);
  check_tensor("chosen", chosen, ScalarType::Int, {from.batch});
  return listed_bwd(query, from, {nullptr, 0, 1, data_of<int32_t>(chosen)}, scale_of(scale, from));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sketchfast, CPU, library) {
  library.impl("triplet_ranking_fwd_native", TORCH_BOX(&triplet_ranking_fwd));
  library.impl("triplet_sampled_fwd_native", TORCH_BOX(&triplet_sampled_fwd));
  library.impl("triplet_matrix_fwd_native", TORCH_BOX(&triplet_matrix_fwd));
  library.impl("triplet_pairs_fwd_native", TORCH_BOX(&triplet_pairs_fwd));
  library.impl("triplet_embedding_bwd_native", TORCH_BOX(&triplet_embedding_bwd));
  library.impl("triplet_sampled_bwd_native", TORCH_BOX(&triplet_sampled_bwd));
  library.impl("triplet_chosen_bwd_native", TORCH_BOX(&triplet_chosen_bwd));
}

}  // namespace triplet_cpu
}  // namespace sketchfast

#endif  // SKETCHFAST_ISA_baseline

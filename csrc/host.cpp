// sketchfast._host: parsers of stroke files and facts about the build, for Python objects, not
// tensors.
//
// Each parser has a twin in sketchfast/data/quickdraw.py that gives the same bits; the tests
// compare them. parse_ndjson reads only the plain JSON that QuickDraw consists of. Any line with
// something else in it (escapes, nested values, long numbers, errors) is handed back to Python,
// which alone decides what is valid.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

// Drawings packed end to end, as sketchfast.data.quickdraw.Parsed.
struct Packed {
  std::vector<float> points;  // x, y
  std::vector<uint8_t> pens;
  std::vector<int64_t> offsets{0};
  std::vector<uint64_t> key_ids;
  std::vector<int8_t> recognized;

  size_t size() const { return pens.size(); }

  // Ends the drawing begun at the last offset.
  void finish(uint64_t key_id, int8_t is_recognized) {
    offsets.push_back(static_cast<int64_t>(pens.size()));
    key_ids.push_back(key_id);
    recognized.push_back(is_recognized);
  }

  // Forgets the drawing begun at the last offset.
  void drop() {
    const auto end = static_cast<size_t>(offsets.back());
    points.resize(2 * end);
    pens.resize(end);
  }
};

template <typename T>
py::array_t<T> to_array(std::vector<T>&& values, std::vector<py::ssize_t> shape) {
  auto* held = new std::vector<T>(std::move(values));
  py::capsule owner(held, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(std::move(shape), held->data(), owner);
}

py::tuple to_tuple(Packed&& packed) {
  const auto points = static_cast<py::ssize_t>(packed.size());
  const auto count = static_cast<py::ssize_t>(packed.key_ids.size());
  return py::make_tuple(to_array(std::move(packed.points), {points, 2}),
                        to_array(std::move(packed.pens), {points}),
                        to_array(std::move(packed.offsets), {count + 1}),
                        to_array(std::move(packed.key_ids), {count}),
                        to_array(std::move(packed.recognized), {count}));
}

// ---- bin
// -------------------------------------------------------------------------------------------

// Reads little-endian numbers; never past the end.
class ByteReader {
 public:
  explicit ByteReader(std::string_view data) : data_(data) {}

  size_t left() const { return data_.size() - at_; }

  template <typename T>
  bool read(T* value) {
    if (left() < sizeof(T)) return false;
    uint64_t bits = 0;
    for (size_t i = 0; i < sizeof(T); ++i) {
      bits |= static_cast<uint64_t>(static_cast<uint8_t>(data_[at_ + i])) << (8 * i);
    }
    *value = static_cast<T>(bits);
    at_ += sizeof(T);
    return true;
  }

  bool take(size_t count, const uint8_t** bytes) {
    if (left() < count) return false;
    *bytes = reinterpret_cast<const uint8_t*>(data_.data()) + at_;
    at_ += count;
    return true;
  }

 private:
  std::string_view data_;
  size_t at_ = 0;
};

// One stroke: uint16 n, n bytes x, n bytes y.
bool read_stroke(ByteReader* in, Packed* out) {
  uint16_t count = 0;
  const uint8_t* xy = nullptr;
  if (!in->read(&count) || !in->take(2 * size_t{count}, &xy)) return false;
  for (size_t i = 0; i < count; ++i) {
    out->points.push_back(xy[i]);
    out->points.push_back(xy[count + i]);
    out->pens.push_back(i + 1 < count);
  }
  return true;
}

bool read_record(ByteReader* in, Packed* out, uint64_t* key, uint8_t* is_recognized) {
  uint16_t country = 0;
  uint32_t time = 0;
  uint16_t strokes = 0;
  if (!(in->read(key) && in->read(&country) && in->read(is_recognized) && in->read(&time) &&
        in->read(&strokes))) {
    return false;
  }
  for (uint16_t i = 0; i < strokes; ++i) {
    if (!read_stroke(in, out)) return false;
  }
  return true;
}

py::tuple parse_bin(const py::bytes& data) {
  const std::string_view view = data;
  Packed packed;
  int64_t empty = 0;
  int64_t truncated = 0;
  {
    py::gil_scoped_release release;
    ByteReader in(view);
    while (in.left() > 0) {
      uint64_t key = 0;
      uint8_t is_recognized = 0;
      if (!read_record(&in, &packed, &key, &is_recognized)) {
        packed.drop();
        ++truncated;
        break;
      }
      if (static_cast<int64_t>(packed.size()) == packed.offsets.back()) {
        ++empty;
      } else {
        packed.finish(key, is_recognized != 0);
      }
    }
  }
  py::tuple arrays = to_tuple(std::move(packed));
  return arrays + py::make_tuple(empty, truncated);
}

// ---- ndjson
// ----------------------------------------------------------------------------------------

// A cursor over one line of plain JSON. Every method returns false for what it does not read.
class LineReader {
 public:
  explicit LineReader(std::string_view line) : at_(line.data()), end_(line.data() + line.size()) {}

  void skip_space() {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }

  bool at_end() const { return at_ == end_; }

  // The character, spaces before it skipped.
  bool eat(char wanted) {
    skip_space();
    if (at_ == end_ || *at_ != wanted) return false;
    ++at_;
    return true;
  }

  bool peek(char wanted) {
    skip_space();
    return at_ < end_ && *at_ == wanted;
  }

  bool eat_word(std::string_view word) {
    skip_space();
    if (static_cast<size_t>(end_ - at_) < word.size()) return false;
    if (std::memcmp(at_, word.data(), word.size()) != 0) return false;
    at_ += word.size();
    return true;
  }

  // A string of printable ASCII without escapes.
  bool read_string(std::string_view* text) {
    if (!eat('"')) return false;
    const char* begin = at_;
    while (at_ < end_ && *at_ != '"') {
      if (*at_ < 0x20 || *at_ > 0x7e || *at_ == '\\') return false;
      ++at_;
    }
    if (at_ == end_) return false;
    *text = std::string_view(begin, static_cast<size_t>(at_ - begin));
    ++at_;
    return true;
  }

  // A number of at most 15 digits without exponent: digits and power of ten are both exact in a
  // double, so that their quotient is the correctly rounded value, the one Python reads.
  bool read_number(double* value) {
    static constexpr double kPowers[] = {1e0, 1e1, 1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                         1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15};
    skip_space();
    const bool negative = at_ < end_ && *at_ == '-';
    if (negative) ++at_;
    uint64_t digits = 0;
    const char* begin = at_;
    if (!read_digits(&digits, 15) || (*begin == '0' && at_ - begin > 1)) return false;
    int fraction = 0;
    const bool is_integer = at_ == end_ || *at_ != '.';
    if (!is_integer) {
      ++at_;
      const char* point = at_;
      if (!read_digits(&digits, 15 - static_cast<int>(point - 1 - begin))) return false;
      fraction = static_cast<int>(at_ - point);
    }
    if (at_ < end_ && (*at_ == 'e' || *at_ == 'E' || *at_ == '.')) return false;
    *value = static_cast<double>(digits) / kPowers[fraction];
    if (negative && !(is_integer && digits == 0)) *value = -*value;  // Python's integer -0 is 0
    return true;
  }

 private:
  // One to `most` digits, appended to *value.
  bool read_digits(uint64_t* value, int most) {
    const char* begin = at_;
    while (at_ < end_ && *at_ >= '0' && *at_ <= '9') {
      if (at_ - begin >= most) return false;
      *value = *value * 10 + static_cast<uint64_t>(*at_ - '0');
      ++at_;
    }
    return at_ > begin;
  }

  const char* at_;
  const char* end_;
};

// A list of numbers.
bool read_numbers(LineReader* in, std::vector<double>* values) {
  values->clear();
  if (!in->eat('[')) return false;
  if (in->eat(']')) return true;
  do {
    double value = 0;
    if (!in->read_number(&value)) return false;
    values->push_back(value);
  } while (in->eat(','));
  return in->eat(']');
}

// Reused from stroke to stroke.
struct StrokeBuffers {
  std::vector<double> x, y, t;
};

// [[x...], [y...]] or [[x...], [y...], [t...]], of one length.
bool read_stroke(LineReader* in, StrokeBuffers* buffers, Packed* out) {
  auto& [x, y, t] = *buffers;
  if (!(in->eat('[') && read_numbers(in, &x) && in->eat(',') && read_numbers(in, &y))) return false;
  if (in->eat(',') && !(read_numbers(in, &t) && t.size() == x.size())) return false;
  if (!in->eat(']') || x.size() != y.size()) return false;
  for (size_t i = 0; i < x.size(); ++i) {
    const auto fx = static_cast<float>(x[i]);
    const auto fy = static_cast<float>(y[i]);
    out->points.push_back(fx);
    out->points.push_back(fy);
    out->pens.push_back(i + 1 < x.size());
  }
  return true;
}

bool read_drawing(LineReader* in, StrokeBuffers* buffers, Packed* out) {
  if (!in->eat('[')) return false;
  if (in->eat(']')) return true;
  do {
    if (!read_stroke(in, buffers, out)) return false;
  } while (in->eat(','));
  return in->eat(']');
}

// The key as a number; longer ones are left to Python.
bool read_key_id(LineReader* in, uint64_t* key_id) {
  std::string_view text;
  if (!in->read_string(&text) || text.size() > 19) return false;
  uint64_t number = 0;
  for (const char c : text) {
    if (c < '0' || c > '9') return false;
    number = number * 10 + static_cast<uint64_t>(c - '0');
  }
  *key_id = number;
  return true;
}

bool skip_scalar(LineReader* in) {
  std::string_view text;
  double number = 0;
  if (in->peek('"')) return in->read_string(&text);
  return in->eat_word("true") || in->eat_word("false") || in->eat_word("null") ||
         in->read_number(&number);
}

// One drawing with at least one point; false leaves the line to Python.
bool read_line(std::string_view line, StrokeBuffers* buffers, Packed* out) {
  LineReader in(line);
  if (!in.eat('{')) return false;
  bool has_drawing = false, has_key = false, has_flag = false;
  uint64_t key_id = 0;
  int8_t is_recognized = -1;
  do {
    std::string_view name;
    if (!in.read_string(&name) || !in.eat(':')) return false;
    // A repeated name is legal JSON (the last one counts) but rare enough for Python.
    if (name == "drawing") {
      if (std::exchange(has_drawing, true) || !read_drawing(&in, buffers, out)) return false;
    } else if (name == "key_id") {
      if (std::exchange(has_key, true) || !read_key_id(&in, &key_id)) return false;
    } else if (name == "recognized") {
      if (std::exchange(has_flag, true)) return false;
      if (in.eat_word("true")) {
        is_recognized = 1;
      } else if (in.eat_word("false")) {
        is_recognized = 0;
      } else {
        return false;
      }
    } else if (!skip_scalar(&in)) {
      return false;
    }
  } while (in.eat(','));
  if (!in.eat('}')) return false;
  in.skip_space();
  if (!in.at_end() || static_cast<int64_t>(out->size()) == out->offsets.back()) return false;
  out->finish(key_id, is_recognized);
  return true;
}

bool is_blank(std::string_view line) {
  return line.find_first_not_of(" \t\r") == std::string_view::npos;
}

py::tuple parse_ndjson(const py::bytes& data) {
  const std::string_view view = data;
  Packed packed;
  std::vector<int64_t> before;  // drawings parsed ahead of each line left to Python
  std::vector<int64_t> spans;   // start and end of each such line
  {
    py::gil_scoped_release release;
    StrokeBuffers buffers;
    for (size_t start = 0; start < view.size();) {
      const size_t newline = view.find('\n', start);
      const size_t end = newline == std::string_view::npos ? view.size() : newline;
      const std::string_view line = view.substr(start, end - start);
      if (!is_blank(line) && !read_line(line, &buffers, &packed)) {
        packed.drop();
        before.push_back(static_cast<int64_t>(packed.key_ids.size()));
        spans.push_back(static_cast<int64_t>(start));
        spans.push_back(static_cast<int64_t>(end));
      }
      start = end + 1;
    }
  }
  const auto count = static_cast<py::ssize_t>(before.size());
  py::tuple arrays = to_tuple(std::move(packed));
  return arrays + py::make_tuple(to_array(std::move(before), {count}),
                                 to_array(std::move(spans), {count, 2}));
}

// ---- build
// -----------------------------------------------------------------------------------------

// Set by CMake: the instruction sets of the CPU kernels, and what was decided about CUDA and why.
#ifndef SKETCHFAST_BUILD_ISAS
#define SKETCHFAST_BUILD_ISAS ""
#endif
#ifndef SKETCHFAST_BUILD_CUDA
#define SKETCHFAST_BUILD_CUDA ""
#endif

py::dict build_info() {
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
  const std::string compiler = "gcc " __VERSION__;
#elif defined(_MSC_VER)
  const std::string compiler = "msvc " + std::to_string(_MSC_VER);
#else
  const std::string compiler = "unknown";
#endif
  py::dict info;
  info["compiler"] = compiler;
  info["cxx_standard"] = static_cast<int64_t>(__cplusplus);
  info["isas"] = SKETCHFAST_BUILD_ISAS;
  info["cuda"] = SKETCHFAST_BUILD_CUDA;
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Parsers of stroke files and facts about the build.";
  module.def(
      "build_info", &build_info,
      "What this module was built with: compiler, cxx_standard, isas (of the CPU kernels), cuda.");
  module.def("parse_bin", &parse_bin, py::arg("data"),
             "QuickDraw .bin -> (points float32 [N,2], pens uint8 [N], offsets int64 [n+1], "
             "key_ids uint64 [n],\n"
             "recognized int8 [n], empty drawings, truncated records).");
  module.def("parse_ndjson", &parse_ndjson, py::arg("data"),
             "QuickDraw .ndjson -> (points, pens, offsets, key_ids, recognized as in parse_bin, "
             "before int64 [m],\n"
             "spans int64 [m,2]): the m lines at spans are left to the caller, line i follows "
             "before[i] drawings.");
}

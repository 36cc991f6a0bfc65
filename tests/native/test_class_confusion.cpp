#include "math/class_confusion.h"

#include <array>
#include <random>
#include <vector>

#include "kernels.h"
#include "simt.h"

using namespace lossmeta;

namespace {

constexpr int64_t ignored = 3;  // a class of its own where there are so many

template <class T>
struct Case {
  using A = accumulate_t<T>;
  int64_t samples, classes, shift;  // `shift` elements keep the logits from being aligned
  std::vector<T> storage = std::vector<T>(shift + samples * classes);
  std::vector<int64_t> labels = std::vector<int64_t>(samples);
  std::vector<double> sums = std::vector<double>(classes * classes);
  std::vector<int64_t> counts = std::vector<int64_t>(classes);

  // `odd` puts in masked, infinite and NaN logits and labels that no class has. `first` samples
  // of 30 are of class 0, so that classes have a few rows and many.
  Case(int64_t samples_, int64_t classes_, bool odd = false, int64_t shift_ = 0, int64_t first = 10)
      : samples(samples_), classes(classes_), shift(shift_) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal(0, 3);
    std::uniform_int_distribution<int64_t> label(0, classes - 1);
    T* logits = storage.data() + shift;
    for (int64_t i = 0; i < samples * classes; ++i) math::store(logits + i, A(normal(random)));
    for (int64_t i = 0; i < samples; ++i) labels[i] = i * 7 % 30 < first ? 0 : label(random);
    if (odd)
      for (int64_t i = 0; i < samples; ++i) {
        if (i % 7 == 1) math::store(logits + i * classes + i % classes, A(-INFINITY));
        if (i % 31 == 2) math::store(logits + i * classes + i % classes, A(i % 2 ? INFINITY : NAN));
        if (i % 37 == 3)
          for (int64_t c = 0; c < classes; ++c) math::store(logits + i * classes + c, A(-INFINITY));
        if (i % 5 == 4) labels[i] = i % 2 ? -1 : i % 3 ? classes : int64_t(1) << 40;
      }
    for (int64_t i = 0; i < samples; ++i) {
      if (labels[i] < 0 || labels[i] >= classes || labels[i] == ignored) continue;
      const auto x = [&](int64_t c) { return double(math::load(logits + i * classes + c)); };
      double m = -INFINITY, sum = 0;
      for (int64_t c = 0; c < classes; ++c) m = std::max(m, x(c));
      for (int64_t c = 0; c < classes; ++c) sum += std::exp(x(c) - m);
      for (int64_t c = 0; c < classes; ++c) sums[labels[i] * classes + c] += std::log(sum) + m - x(c);
      ++counts[labels[i]];
    }
  }

  template <class Run>
  void check(const Run& run, const char* backend, int variant) const {
    const double tolerance = sizeof(A) == 8 ? 1e-13 : 2e-6;
    for (bool accumulate : {false, true}) {
      // One element beyond each: nothing may be written there.
      std::vector<double> s(sums.size() + 1, accumulate ? 5. : NAN);
      std::vector<int64_t> n(counts.size() + 1, 7);
      s.back() = -77;
      std::vector<unsigned char> scratch(class_confusion_scratch(samples, classes) + 64, 0xff);
      run(ClassConfusion{dtype_of<T>, accumulate, samples, classes, ignored, storage.data() + shift,
                         labels.data(), s.data(), n.data(), scratch.data()});
      for (size_t i = 0; i < sums.size(); ++i)
        CHECK_NEAR(s[i], sums[i] + (accumulate ? 5 : 0), tolerance * 10, tolerance, backend, variant, " ",
                   samples, "x", classes, " element ", i);
      for (size_t i = 0; i < counts.size(); ++i)
        CHECK(n[i] == counts[i] + (accumulate ? 7 : 0), backend, variant, " ", samples, "x", classes,
              " count ", i, ": ", n[i]);
      CHECK(s.back() == -77 && n.back() == 7, "written beyond the end");
      for (int i = 0; i < 64; ++i)
        CHECK(scratch[scratch.size() - 64 + i] == 0xff, backend, variant, " ", samples, "x", classes,
              " scratch overrun");
    }
  }
};

template <class Check>
void for_every_type(const Check& check, int64_t samples, int64_t classes, bool odd = false, int64_t shift = 0,
                    int64_t first = 10) {
  check(Case<float>(samples, classes, odd, shift, first));
  check(Case<double>(samples, classes, odd, shift, first));
  check(Case<bfloat16>(samples, classes, odd, shift, first));
  check(Case<float16>(samples, classes, odd, shift, first));
}

template <class Check>
void for_every_case(const Check& check) {
  // Few classes; one part and several; rows of one vector and its neighbours; a batch of rows and its neighbours; more
  // than one chunk of samples; packed and not; a block per row.
  for (auto [samples, classes] : {std::pair{0, 5},
                                  {1, 1},
                                  {9, 2},
                                  {260, 10},
                                  {70, 16},
                                  {40, 17},
                                  {100, 32},
                                  {300, 33},
                                  {30, 64},
                                  {20, 259},
                                  {8, 1100},
                                  {5, 1032}})
    for (bool odd : {false, true}) for_every_type(check, samples, classes, odd);
  for_every_type(check, 30, 64, false, 1);
}

}  // namespace

TEST(cpu) {
  const auto check = [](const auto& c) {
    on_every_cpu([&](int isa) { c.check(cpu::class_confusion, "isa ", isa); });
  };
  for_every_case(check);
  for_every_type(check, 2500, 10);
  for_every_type(check, 1500, 70, true);
}

TEST(cuda) {
  for_every_case([](const auto& c) {
    // There is a block for each class: of many, the blocks of one launch are as many orders of threads.
    const int seeds = c.classes > 200 ? 1 : 4;
    for (int seed = 0; seed < seeds; ++seed) {
      simt::set_seed(seed);
      c.check([](const ClassConfusion& a) { cuda::class_confusion(a, nullptr); }, "seed ", seed);
    }
  });
}

// The last block adds up what the others left: labels of all classes, nine of ten of one class, all of one class; rows that
// are not aligned.
TEST(cuda_in_several_parts) {
  int seed = 0;
  for (int64_t first : {10, 27, 30})
    for (auto [samples, classes, shift] :
         {std::array<int64_t, 3>{1500, 10, 0}, {1500, 36, 1}, {600, 64, 0}}) {
      CHECK(class_confusion_parts(samples, classes) > 1, samples, 'x', classes);
      simt::set_seed(++seed);
      for_every_type(
          [&](const auto& c) {
            c.check([](const ClassConfusion& a) { cuda::class_confusion(a, nullptr); }, "parts ", seed);
          },
          samples, classes, first == 10, shift, first);
    }
}

// The order of threads and blocks shows in no bit.
TEST(cuda_is_deterministic) {
  const Case<float> c(1000, 20);
  std::vector<double> first(400), sums(400);
  std::vector<int64_t> counts(20);
  std::vector<unsigned char> scratch(class_confusion_scratch(1000, 20));
  for (int seed = 0; seed < 5; ++seed) {
    simt::set_seed(seed);
    cuda::class_confusion({DType::float32, false, 1000, 20, -100, c.storage.data(), c.labels.data(),
                           sums.data(), counts.data(), scratch.data()},
                          nullptr);
    if (seed == 0) first = sums;
    CHECK(sums == first, "seed ", seed);
  }
}

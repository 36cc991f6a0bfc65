// A minimal harness for native tests: one test file per executable; the names of tests on the command line select.
#pragma once

#include <cmath>
#include <cstring>
#include <exception>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test> tests;
inline int failures = 0;  // of the test that is running

inline bool add(const char* name, void (*run)()) {
  tests.push_back({name, run});
  return true;
}

template <class... Message>
bool verify(bool ok, const char* file, int line, const char* condition, const Message&... message) {
  if (ok) return true;
  constexpr int shown = 10;
  if (++failures > shown) return false;
  std::ostringstream text;
  text.precision(17);
  ((text << file << ':' << line << ": " << condition << "  ") << ... << message);
  std::cout << "  " << text.str() << (failures == shown ? "\n  (further failures are not shown)" : "") << std::endl;
  return false;
}

// |actual − expected| ≤ absolute + relative·|expected|; equal infinities are near, and so are two NaN.
template <class... Message>
bool verify_near(double actual, double expected, double absolute, double relative, const char* file, int line,
                 const char* text, const Message&... message) {
  bool near = actual == expected || (std::isnan(actual) && std::isnan(expected)) ||
              (std::isfinite(expected) && std::abs(actual - expected) <= absolute + relative * std::abs(expected));
  return verify(near, file, line, text, "got ", actual, ", expected ", expected, " ", message...);
}

}  // namespace check

#define TEST(name)                                               \
  static void test_##name();                                     \
  static const bool added_##name = check::add(#name, test_##name); \
  static void test_##name()

// CHECK(condition, message...): a test goes on after a failure; the parts of the message are streamed.
#define CHECK(...) CHECK_WITH(__VA_ARGS__, "")
#define CHECK_WITH(condition, ...) check::verify(bool(condition), __FILE__, __LINE__, #condition, __VA_ARGS__)

// CHECK_NEAR(actual, expected, absolute, relative, message...)
#define CHECK_NEAR(...) CHECK_NEAR_WITH(__VA_ARGS__, "")
#define CHECK_NEAR_WITH(actual, expected, absolute, relative, ...) \
  check::verify_near(actual, expected, absolute, relative, __FILE__, __LINE__, #actual " ~ " #expected, __VA_ARGS__)

int main(int argc, char** argv) {
  int passed = 0, failed = 0;
  for (const check::Test& test : check::tests) {
    bool selected = argc == 1;
    for (int i = 1; i < argc; ++i) selected |= !std::strcmp(argv[i], test.name);
    if (!selected) continue;
    check::failures = 0;
    try {
      test.run();
    } catch (const std::exception& error) {
      check::verify(false, test.name, 0, "exception:", error.what());
    }
    ++(check::failures ? failed : passed);
    std::cout << (check::failures ? "FAILED  " : "passed  ") << test.name << std::endl;
  }
  std::cout << passed << " passed, " << failed << " failed" << std::endl;
  return failed || !passed;  // a misspelt name is a failure too
}

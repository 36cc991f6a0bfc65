// A minimal harness for native tests, one test file per executable; arguments name the tests to run (all).
#pragma once

#include <algorithm>
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

inline bool add(const char* name, void (*run)()) { return tests.push_back({name, run}), true; }

template <class... Message>
void fail(const char* file, int line, const char* condition, const Message&... message) {
  constexpr int shown = 10;
  if (++failures > shown) return;
  std::ostringstream text;
  text.precision(17);
  ((text << "  " << file << ':' << line << ": " << condition << "  ") << ... << message);
  if (failures == shown) text << "\n  (further failures are not shown)";
  std::cout << text.str() << std::endl;
}

// |actual − expected| ≤ absolute + relative·|expected|; equal infinities are near, and so are two NaN.
inline bool is_near(double actual, double expected, double absolute, double relative) {
  if (actual == expected || (std::isnan(actual) && std::isnan(expected))) return true;
  return std::isfinite(expected) && std::abs(actual - expected) <= absolute + relative * std::abs(expected);
}

}  // namespace check

#define TEST(name)                                                 \
  static void test_##name();                                       \
  static const bool added_##name = check::add(#name, test_##name); \
  static void test_##name()

// CHECK(condition, message...): a test goes on after a failure; the parts of the message are streamed. They, and what
// is compared again to be shown, are only evaluated for one.
#define CHECK(...) CHECK_WITH(__VA_ARGS__, "")
#define CHECK_WITH(condition, ...) \
  ((condition) ? void() : check::fail(__FILE__, __LINE__, #condition, __VA_ARGS__))

// CHECK_NEAR(actual, expected, absolute, relative, message...)
#define CHECK_NEAR(...) CHECK_NEAR_WITH(__VA_ARGS__, "")
#define CHECK_NEAR_WITH(actual, expected, absolute, relative, ...)                                          \
  (check::is_near(actual, expected, absolute, relative)                                                     \
       ? void()                                                                                             \
       : check::fail(__FILE__, __LINE__, #actual " near " #expected, "got ", double(actual), ", expected ", \
                     double(expected), " ", __VA_ARGS__))

int main(int argc, char** argv) {
  int passed = 0, failed = 0;
  for (const check::Test& test : check::tests) {
    auto is_named = [&](const char* name) { return !std::strcmp(name, test.name); };
    if (argc > 1 && std::none_of(argv + 1, argv + argc, is_named)) continue;
    check::failures = 0;
    try {
      test.run();
    } catch (const std::exception& error) {
      check::fail(test.name, 0, "exception:", error.what());
    }
    ++(check::failures ? failed : passed);
    std::cout << (check::failures ? "FAILED  " : "passed  ") << test.name << std::endl;
  }
  std::cout << passed << " passed, " << failed << " failed" << std::endl;
  return failed || !passed;  // a misspelt name is a failure too
}

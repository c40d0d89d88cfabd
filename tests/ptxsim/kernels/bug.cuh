// Kernels for tests of the interpreter, each with bugs that -DBUG=n plants: n is a row of the table in test_planted_bugs.
// A line that ends in "// [n]" is where the interpreter has to report bug n.
#pragma once

#ifndef BUG
#define BUG 0
#endif

template <int kNumber>
constexpr bool kBug = kNumber == BUG;

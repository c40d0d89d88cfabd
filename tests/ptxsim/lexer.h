// Words of PTX text, one after the other, without copies.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace ptxsim {

class Lexer {
 public:
  explicit Lexer(std::string_view text, uint32_t line = 1) : p_(text.data()), end_(p_ + text.size()), line_(line) {}

  uint32_t line() const { return line_; }
  bool done() {
    skip();
    return p_ == end_;
  }
  // The next character that is not space or comment; 0 at the end.
  char peek() {
    skip();
    return p_ == end_ ? 0 : *p_;
  }
  bool accept(char c) {
    if (peek() != c) return false;
    ++p_;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) fail(std::string("'") + c + "' expected");
  }
  // A name, a directive, an opcode with its modifiers or a number: [%$.A-Za-z0-9_]+ and "::".
  std::string_view word() {
    skip();
    const char* begin = p_;
    while (p_ != end_ && (is_word(*p_) || (*p_ == ':' && p_ + 2 < end_ && p_[1] == ':' && is_word(p_[2]) && p_ != begin)))
      p_ += *p_ == ':' ? 2 : 1;
    if (p_ == begin) fail("a name or a number expected");
    return {begin, static_cast<size_t>(p_ - begin)};
  }
  std::string_view string() {
    expect('"');
    const char* begin = p_;
    while (p_ != end_ && *p_ != '"') ++p_;
    const std::string_view text(begin, static_cast<size_t>(p_ - begin));
    if (p_ != end_) ++p_;
    return text;
  }
  // The text up to the matching '}'; the '{' has been read.
  std::string_view body() {
    const char* begin = p_;
    int depth = 1;
    for (; p_ != end_; ++p_) {
      if (*p_ == '\n') ++line_;
      if (*p_ == '{') ++depth;
      if (*p_ == '}' && --depth == 0) {
        const std::string_view text(begin, static_cast<size_t>(p_ - begin));
        ++p_;
        return text;
      }
      if (*p_ == '/' && p_ + 1 != end_ && p_[1] == '/') {
        while (p_ != end_ && *p_ != '\n') ++p_;
        if (p_ == end_) break;
        ++line_;
      } else if (*p_ == '"') {
        do ++p_;
        while (p_ != end_ && *p_ != '"' && *p_ != '\n');
        if (p_ == end_) break;
        if (*p_ == '\n') ++line_;
      }
    }
    fail("'}' missing");
  }
  const char* position() const { return p_; }
  void rewind(const char* position, uint32_t line) {
    p_ = position;
    line_ = line;
  }
  [[noreturn]] void fail(const std::string& what) const {
    std::string rest;
    for (const char* p = p_; p != end_ && *p != '\n' && rest.size() < 40; ++p) rest += *p;
    throw std::runtime_error("PTX line " + std::to_string(line_) + ": " + what + " before `" + rest + "`");
  }
  static bool is_word(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' ||
           c == '%' || c == '$';
  }

 private:
  void skip() {
    while (p_ != end_) {
      if (*p_ == '\n') {
        ++line_;
        ++p_;
      } else if (*p_ == ' ' || *p_ == '\t' || *p_ == '\r' || *p_ == '\0') {
        ++p_;
      } else if (*p_ == '/' && p_ + 1 != end_ && p_[1] == '/') {
        while (p_ != end_ && *p_ != '\n') ++p_;
      } else if (*p_ == '/' && p_ + 1 != end_ && p_[1] == '*') {
        p_ += 2;
        while (p_ != end_ && !(*p_ == '*' && p_ + 1 != end_ && p_[1] == '/')) line_ += *p_++ == '\n';
        p_ = end_ - p_ < 2 ? end_ : p_ + 2;
      } else {
        return;
      }
    }
  }
  const char* p_;
  const char* end_;
  uint32_t line_;
};

// Integers (decimal, 0x, 0b, octal; U suffix) and floats (0f, 0d, decimal): false if `word` is none. Floats come as the
// bits of a double.
struct Number {
  bool is_float = false;
  bool single = false;  // 0f...: `bits` are those of a float
  uint64_t bits = 0;
};
bool parse_number(std::string_view word, Number& number);

}  // namespace ptxsim

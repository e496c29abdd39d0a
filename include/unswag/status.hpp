// What every entry point returns: a code and, when something is wrong, a message that names the argument, the value and
// the remedy.  The core does not print, throw or abort; a Status that is ok holds no memory.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>
#include <utility>

namespace unswag {

enum class StatusCode : std::uint8_t {
  ok,
  invalid_type,      // dtype or layout      -> Python TypeError
  invalid_argument,  // value or shape       -> Python ValueError
  not_supported,     // no kernel for this   -> Python NotImplementedError
  device_error,      // the device refused   -> Python RuntimeError
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::ok; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::ok;
  std::string message_;
};

// g++ 12 has no <format>: parts are written one after the other.
template <class... Parts>
Status make_status(StatusCode code, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return {code, text.str()};
}
template <class... Parts>
Status invalid_type(const Parts&... parts) {
  return make_status(StatusCode::invalid_type, parts...);
}
template <class... Parts>
Status invalid_argument(const Parts&... parts) {
  return make_status(StatusCode::invalid_argument, parts...);
}
template <class... Parts>
Status not_supported(const Parts&... parts) {
  return make_status(StatusCode::not_supported, parts...);
}
template <class... Parts>
Status device_error(const Parts&... parts) {
  return make_status(StatusCode::device_error, parts...);
}

}  // namespace unswag

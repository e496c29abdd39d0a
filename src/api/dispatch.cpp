// Which kernels serve a call.
#include "unswag/unswag.hpp"

namespace unswag {

std::string_view version() { return UNSWAG_VERSION; }

}  // namespace unswag

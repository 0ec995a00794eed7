#include <omlx.h>

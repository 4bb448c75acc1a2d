/* Large pages for large memory: Linux provides new memory page by page, when it is first written to, and a page of 2 MiB
   takes it much less time than 512 of 4 KiB. */
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#define LARGE_PAGE ((int64_t)2 << 20)

/* Ask for large pages where they lie wholly within these bytes. If there are none, nothing happens. */
static void use_large_pages(void *data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const int64_t start = ((int64_t)data + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    const int64_t end = ((int64_t)data + bytes) / LARGE_PAGE * LARGE_PAGE;
    if (start < end) madvise((void *)start, (size_t)(end - start), MADV_HUGEPAGE);
#endif
}

#!/usr/bin/env bash
# The parallel CPU kernels under ThreadSanitizer, their tasks on std::thread (tests/sanitizers/threads.cpp).
#
# usage: scripts/sanitize_threads.sh
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build/sanitize-threads
printf '%s\n' csrc/kernels/cpu/*.cpp tests/sanitizers/threads.cpp |
    xargs -P "$(nproc)" -I{} sh -c '"$0" -std=c++20 -O1 -g -fsanitize=thread -Wall -Wextra -Wno-psabi -c "$1" \
        -o "build/sanitize-threads/$(basename "$1" .cpp).o"' "${CXX:-g++}" {}
"${CXX:-g++}" -fsanitize=thread build/sanitize-threads/*.o -o build/sanitize-threads/threads
TSAN_OPTIONS=halt_on_error=0:exitcode=66 build/sanitize-threads/threads

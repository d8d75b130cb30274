#!/usr/bin/env bash
# The parallel CPU kernels under ThreadSanitizer, their tasks on std::thread (tests/sanitizers/threads.cpp). Then the
# same kernels with races put in, each of which has to be reported: else the first run says nothing.
#
# usage: scripts/sanitize_threads.sh
set -euo pipefail
cd "$(dirname "$0")/.."
out=build/sanitize-threads

# In which function, in which file, what is left out there: where a task's own part of a buffer begins.
races=(
    "norm_moments|moments.cpp| + slice * columns"
    "symmetric_gram|gram.h| + (slice - 1) * area"
    "empirical_prediction|prediction.cpp| + b * x.columns"
    "gram_of|gradients.cpp| + slice * area"
    "gradient_fisher_gram|gradients.cpp| + slice * size"
    "softmax_fisher_gram|fisher_gram.cpp| + slice * area"
    "gradient_tiles|fisher.cpp| + (slab.begin[r] * grid.groups + group * run.depth) * panel_row"
    "contract|fisher_contraction.h| + panel * b_rows * kPanel<C>"
    "plane_products|fisher.cpp|group * shape.samples + "
)

# Two copies of the sources, without the element types that the driver does not use.
rm -rf $out
for copy in clean racy; do
    mkdir -p $out/$copy/csrc/kernels $out/$copy/tests/sanitizers
    cp -r csrc/kernels/cpu csrc/kernels/scalar.h $out/$copy/csrc/kernels
    cp tests/sanitizers/threads.cpp $out/$copy/tests/sanitizers
    sed -i '/^TRANSFEROPS_INSTANTIATE(b\?float16)$/d' $out/$copy/csrc/kernels/cpu/*.cpp
done
for race in "${races[@]}"; do
    IFS='|' read -r function file text <<<"$race"
    file=$out/racy/csrc/kernels/cpu/$file source=$(<"$file")
    [[ $source == *"$text"* ]] || { echo "$file: no '$text' to leave out in $function" >&2; exit 1; }
    printf '%s\n' "${source/"$text"/}" >"$file"
done

printf '%s\n' $out/*/csrc/kernels/cpu/*.cpp $out/*/tests/sanitizers/threads.cpp |
    xargs -P "$(nproc)" -I{} sh -c '"$0" -std=c++20 -O1 -g1 -fsanitize=thread -Wall -Wextra -Wno-psabi -c "$1" \
        -o "${1%.cpp}.o"' "${CXX:-g++}" {}
for copy in clean racy; do
    "${CXX:-g++}" -fsanitize=thread $out/$copy/csrc/kernels/cpu/*.o $out/$copy/tests/sanitizers/threads.o -o $out/threads-$copy
done

export TSAN_OPTIONS=halt_on_error=0:exitcode=66
$out/threads-clean
$out/threads-racy >$out/racy.txt 2>&1 && { echo "races were put in, and none is reported" >&2; exit 1; }
for race in "${races[@]}"; do
    function=${race%%|*}
    grep -q "\b$function<" $out/racy.txt || { # somewhere in the stacks of a report
        echo "a race put into $function is not reported, see $out/racy.txt" >&2
        exit 1
    }
done
echo "${#races[@]} races put in, all reported"

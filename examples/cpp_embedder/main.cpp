// H-score of random features, computed in C++ from the class moments: H = || L^-1 R ||_F^2 with gram = L L^T and
// R = class sums over the square roots of the class counts. Random labels score (C - 1) D / (N - 1) on average.
#include <torch/torch.h>
#include <transferops/ops.h>

#include <cstdio>

int main() {
    torch::manual_seed(0);
    const int64_t samples = 4000, dimension = 40, classes = 5;
    const auto features = torch::randn({samples, dimension});
    const auto labels = torch::randint(classes, {samples}, torch::kLong);

    const auto moments = transferops::class_moments(features, labels, classes);
    const auto means = moments.sums / moments.counts.to(torch::kDouble).sqrt().unsqueeze(1);
    const auto factor = torch::linalg_cholesky(moments.gram);
    const auto solved = torch::linalg_solve_triangular(factor, means.mT(), /*upper=*/false);
    const double score = solved.square().sum().item<double>();

    const auto centred = features.to(torch::kDouble) - moments.shift;
    const double error = (centred.mT().matmul(centred) - moments.gram).abs().max().item<double>();
    const double chance = static_cast<double>((classes - 1) * dimension) / static_cast<double>(samples - 1);
    std::printf("transferops %s: H-score of random labels %.9f (expected about %.4f), Gram error %.1e\n",
                transferops::linked_version, score, chance, error);
    return error < 1e-9 && score > chance / 2 && score < chance * 2 ? 0 : 1;
}

"""Time per SAE of the metrics: masksae against SAEBench 0.6.0.

    make peers
    .venv-peers/bin/python benchmarks/metrics.py               # the table of benchmarks/README.md, some minutes
    .venv-peers/bin/python benchmarks/metrics.py --only tpp    # one row
    .venv-peers/bin/python benchmarks/metrics.py --ranking smoke    # the ranking of 0.2 beside ours, on trained SAEs

Same process, same threads, same SAE (2,048 latents on d 576, thresholded to L0 20), same arrays; rounds take turns, the
numbers are medians. What is shared by all SAEs of a comparison is made before the clock starts, on both sides. Two
things favour SAEBench: in "absorption" its prompts of the second stage cost nothing (a stand-in hands over activations
that are there), and in "core" the random text has no loading. Ours, in "core", spreads the forwards that no SAE changes
over the SAEs of one comparison (--saes).

"absorption" has a row for our own version 0.2 too: its ranking probe took 50 epochs of Adam on dense latents, and its
small regressions were scikit-learn's.
"""

import argparse
import contextlib
import io
import statistics
import time
from types import SimpleNamespace

import torch
from peers import spelling_model

from masksae import SAE, BatchTopK, SAEConfig
from masksae.export import saebench_adapter
from masksae.metrics import absorption, probes
from masksae.metrics.perturbation import Probe, Texts, scr, tpp
from masksae.metrics.reconstruction import calibrated_threshold, reconstruction
from masksae.tracing import activations, spliced_losses

D, F, L0 = 576, 2048, 20
NS = (2, 5, 10, 20, 50, 100, 500)


@torch.no_grad()
def make_sae(x: torch.Tensor, seed: int = 0) -> SAE:
    """An SAE as initialised, thresholded so that L0 on x is 20; times do not depend on what it learned."""
    sae = SAE(SAEConfig(D, F, BatchTopK(L0), seed=seed)).requires_grad_(False)
    sae.threshold.fill_(calibrated_threshold(sae, x, L0))
    return sae


def adapted(sae: SAE):
    return saebench_adapter(sae, model_name="pythia-160m-deduped", layer=4)


def clock(action) -> float:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        action()
    return time.perf_counter() - start


def absorption_case(words: int):
    """Per SAE, the word activations and the probe being there: ranking, splitting, absorption of every test word."""
    from sae_bench.evals.absorption import feature_absorption as module
    from sae_bench.evals.absorption import k_sparse_probing as theirs
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
    from sae_bench.evals.absorption.probing import LinearProbe

    generator = torch.Generator().manual_seed(0)
    names = [
        chr(97 + i % 26) + f"{i // 26:04d}".translate(str.maketrans("0123456789", "abcdefghij")) for i in range(words)
    ]
    letters = probes.first_letters(names)
    x = torch.randn(words, D, generator=generator) + torch.randn(26, D, generator=generator)[letters]
    sae, probe = make_sae(x), probes.letter_probe(x, names)
    adapter, by_word = adapted(sae), dict(zip(names, x))
    their_probe = LinearProbe(D, 26)
    their_probe.weights.data.copy_(probe.weight)
    their_probe.biases.data.copy_(probe.bias)
    side = lambda chosen: ([(names[i], int(letters[i])) for i in chosen.nonzero().flatten()], x[chosen])
    (train, x_train), (test, x_test) = side(~probe.is_test), side(probe.is_test)

    def peer(precomputed: bool):
        with torch.enable_grad():
            ks = theirs.train_k_sparse_probes(
                adapter, train, x_train, ks=list(range(1, 11)), precalc_sae_acts=precomputed
            )
        raw = theirs.eval_probe_and_sae_k_sparse_raw_scores(adapter, their_probe, ks, test, x_test)
        metadata = theirs.sae_k_sparse_metadata(adapter, their_probe, ks, "sae", 4)
        metrics = theirs.build_metrics_df(raw, metadata, max_k_value=10)
        theirs.add_feature_splits_to_metrics_df(metrics, max_k_value=10)
        calculator = FeatureAbsorptionCalculator(
            model=spelling_model(by_word), icl_word_list=names, max_icl_examples=10, word_token_pos=0
        )
        before, module.load_experiment_df = module.load_experiment_df, lambda *_: raw
        try:
            likely = module.get_stats_and_likely_false_negative_tokens(metrics, "sae", 4, _Folder())
        finally:
            module.load_experiment_df = before
        module.calculate_projection_and_cos_sims(calculator, adapter, their_probe, 4, likely)

    def ours():
        absorption.first_letter(sae, x, names, probe=probe, min_letters=1)

    peers = {"as shipped": lambda: peer(False), "with its option to encode once": lambda: peer(True)}
    return ours, {"masksae 0.2": lambda: first_letter_before(sae, x, names, probe)} | peers


@torch.no_grad()
def first_letter_before(sae, x: torch.Tensor, words: list[str], probe, threshold=None) -> absorption.AbsorptionResult:
    """The score as version 0.2 took it: dense latents, latents ranked by an unfinished probe, sklearn's regressions."""
    letters, f, train = probes.first_letters(words), sae.latents(x, threshold), ~probe.is_test
    y = torch.nn.functional.one_hot(letters, 26)
    ranked, found = rank_before(f[train], y[train].float()), []
    density = (f > 0).double().mean(0)
    for letter in absorption.gated_letters(probe, 1):
        mine = probe.is_test & (letters == letter) & (probe.logits(x)[:, letter] > 0)
        if mine.any():
            main = main_before(f, letters == letter, train, ranked[letter])
            sample = x[mine], f[mine], sae.W_dec.cpu(), probe.weight[letter]
            found.append(absorption.parent_result(chr(97 + letter), *sample, density, main, probe.f1[letter]))
    return absorption.summary(found, ())


def rank_before(f: torch.Tensor, y: torch.Tensor) -> list[list[int]]:
    """Ten largest weights after 50 epochs of Adam, zeros and all."""
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=(len(y) - y.sum(0)) / y.sum(0).clamp(min=1))
    weight, bias = (torch.zeros(*size, requires_grad=True) for size in ((y.shape[1], f.shape[1]), (y.shape[1],)))
    adam = torch.optim.Adam([weight, bias], lr=1e-2, weight_decay=1e-6, fused=True)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for epoch in range(50):
            adam.param_groups[0]["lr"] = 1e-2 * 1e-3 ** (epoch / 50)
            for rows in torch.randperm(len(f), generator=generator).split(256):
                adam.zero_grad(set_to_none=True)
                total = loss(torch.addmm(bias, f[rows], weight.t()), y[rows]) + 0.01 * weight.abs().sum(1).mean()
                total.backward()
                adam.step()
    return weight.detach().topk(absorption.MAX_MAIN, dim=1).indices.tolist()


def main_before(f: torch.Tensor, positive: torch.Tensor, train: torch.Tensor, ranked: list[int]) -> absorption.Main:
    from sklearn.linear_model import LogisticRegression

    best = absorption.Main((), 0.0, -1.0)
    for k in range(1, len(ranked) + 1):
        model = LogisticRegression(max_iter=500, class_weight="balanced")
        model.fit(f[train][:, ranked[:k]].numpy(), positive[train].numpy())
        predicted, true = (
            torch.from_numpy(model.decision_function(f[~train][:, ranked[:k]].numpy()) > 0),
            positive[~train],
        )
        score = probes.f1(predicted[:, None], true[:, None]).item()
        if k > 1 and score <= best.f1 + absorption.F1_JUMP:
            break
        best = absorption.Main(tuple(ranked[:k]), (predicted & true).sum().item() / int(true.sum()), score)
    return best


@torch.no_grad()
def ranking_table(profile: str) -> str:
    """What the optimum of the ranking probe changes on the first pair of a profile, at matched clean L0."""
    from masksae import Run
    from masksae.study.scores.absorption import word_activations
    from masksae.study.scores.matched import thresholds

    run = Run(profile).parts[0]
    words, x = word_activations(run)
    probe, at, saes = probes.letter_probe(x, words, seed=run.profile.absorption.seed), thresholds(run), run.load_saes()
    lines = ["| SAE | ranking | main latents | F1 | recall | full | specific | same first latent |", "| --- " * 8 + "|"]
    for row in {row["arm"]: row for row in reversed(run.table)}.values():
        sae, threshold = saes[row["sae"]], at[row["sae"]]["matched"]
        new = absorption.first_letter(sae, x, words, probe=probe, threshold=threshold, min_letters=1)
        old = first_letter_before(sae, x, words, probe, threshold)
        same = sum(a.main[0] == b.main[0] for a, b in zip(old.letters, new.letters))
        for label, result in (("0.2", old), ("optimum", new)):
            means = (
                result.mean_split_latents,
                result.main_f1,
                result.main_recall,
                result.mean_full,
                result.mean_specific,
            )
            numbers = " | ".join(f"{mean:.3f}" for mean in means)
            lines.append(f"| {row['sae']} | {label} | {numbers} | {same} of {len(new.letters)} letters |")
    return "\n".join(lines)


class _Folder:
    """Stands for a folder of results that are handed over in memory."""

    def __truediv__(self, other):
        return self


def perturbation_case(texts: int, spurious: bool):
    """Per SAE, activations and probes being there: effects, and every ablation of every class at seven sizes."""
    from sae_bench.evals.scr_and_tpp import main as theirs
    from sae_bench.evals.sparse_probing.probe_training import Probe as TheirProbe

    generator = torch.Generator().manual_seed(0)
    paired = {"male / female": "female_data_only", "professor / nurse": "nurse_data_only"}
    both = {"male_professor / female_nurse": "female_nurse_data_only"}
    names = [*paired, *paired.values(), *both, *both.values()] if spurious else ["a", "b", "c", "d", "e"]
    make = lambda: {name: torch.randn(texts, 64, D, generator=generator) for name in names}
    train, test = make(), make()
    sae = make_sae(train[names[0]].flatten(0, 1))
    adapter = adapted(sae)
    weights = {name: torch.randn(D, generator=generator) for name in names}
    their_probes = {}
    for name, weight in weights.items():
        their_probes[name] = TheirProbe(D, torch.float32)
        their_probes[name].net.weight.data.copy_(weight)
    classes = [*paired, *both] if spurious else names

    def peer():
        effects = theirs.get_all_node_effects_for_one_sae(adapter, their_probes, classes, spurious, train, 125)
        theirs.perform_feature_ablations(their_probes, adapter, 125, test, effects, list(NS), classes, 500, spurious)

    def ours():
        needed = (
            [*paired, *paired.values()] if spurious else names
        )  # the biased texts served to train a probe, on both sides
        average = lambda side: {name: (side[name].mean(1), sae.encode(side[name]).mean(1)) for name in needed}
        (a, b), probe = (average(train), average(test)), {name: Probe(w, 0.0) for name, w in weights.items()}
        if spurious:
            halves = lambda side: tuple(labelled(side, [name], [other]) for name, other in paired.items())
            scr(probe[[*both][0]], tuple(probe[name] for name in paired), halves(a), halves(b), sae.W_dec, ns=NS)
        else:
            sides = [[labelled(side, [c], [o for o in names if o != c]) for c in names] for side in (a, b)]
            tpp([probe[c] for c in names], *sides, sae.W_dec, ns=NS)

    return ours, {"as shipped": peer}


def labelled(side: dict, positives: list[str], negatives: list[str]) -> Texts:
    """Averaged texts of some classes against an equal number of others."""
    share = len(side[positives[0]][0]) // len(negatives)
    parts = [side[name] for name in positives] + [(side[name][0][:share], side[name][1][:share]) for name in negatives]
    x, f = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    return Texts(x, f, torch.arange(len(x)) < len(side[positives[0]][0]))


def core_case(block: int, saes: int, batches: int):
    """Per SAE: CE and KL on one batch of text, sparsity and variance on `batches` (SAEBench publishes 200 and
    2,000)."""
    from sae_bench.evals.core.main import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics

    language_model = hooked_pair()
    ids = torch.randint(10, 40_000, (4 * batches, 128), generator=torch.Generator().manual_seed(0))
    x = activations(language_model.ours, ids, block=block)
    trained = [make_sae(x[:32].flatten(0, 1), seed) for seed in range(saes)]
    adapter = saebench_adapter(trained[0], model_name="pythia-160m-deduped", layer=block)

    def peer():
        rows = iter([ids[:4], *ids.split(4)])
        store = SimpleNamespace(get_batch_tokens=lambda n: next(rows))
        get_downstream_reconstruction_metrics(adapter, language_model.theirs, store, True, True, 1, 4)
        get_sparsity_and_variance_metrics(
            adapter, language_model.theirs, store, batches, True, True, True, True, 4, model_kwargs={}
        )

    def ours():
        cached = activations(language_model.ours, ids, block=block).flatten(0, 1)
        for sae in trained:
            reconstruction(sae, cached)
        splices = {i: lambda x, sae=sae: sae.decode(sae.encode(x)) for i, sae in enumerate(trained)}
        spliced_losses(language_model.ours, ids[:4], splices, block=block)

    return ours, {"as shipped": peer}


def hooked_pair():
    """A random language model of SmolLM2-135M's shape: for us, and as TransformerLens has it with the same weights."""
    import transformers
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

    shape = dict(
        hidden_size=D,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
    )
    torch.manual_seed(0)
    ours = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape)).eval().requires_grad_(False)
    config = HookedTransformerConfig(
        d_model=D, d_head=64, n_heads=9, n_key_value_heads=3, n_layers=30, n_ctx=256, d_vocab=49_152, d_mlp=1536,
        act_fn="silu", normalization_type="RMS", positional_embedding_type="rotary", rotary_dim=64,
        rotary_adjacent_pairs=False, gated_mlp=True, final_rms=True, eps=ours.config.rms_norm_eps,
        original_architecture="LlamaForCausalLM",
    )  # fmt: skip
    theirs = HookedTransformer(config)
    theirs.load_state_dict(convert_llama_weights(ours, config), strict=False)
    ids = torch.randint(10, 40_000, (1, 8))
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids), ours(ids).logits, rtol=1e-3, atol=1e-3
        )  # the same model, so the same work
    return SimpleNamespace(ours=ours, theirs=theirs.eval())


def cases(options) -> dict:
    return {
        "absorption": (lambda: absorption_case(options.words), 1),
        "tpp": (lambda: perturbation_case(options.texts, False), 1),
        "scr": (lambda: perturbation_case(options.texts, True), 1),
        "core, block 4 of 30": (lambda: core_case(4, options.saes, options.batches), options.saes),
        "core, block 19 of 30": (lambda: core_case(19, options.saes, options.batches), options.saes),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--words", type=int, default=4000, help="words of the first-letter task")
    parser.add_argument("--texts", type=int, default=100, help="texts of a class, on each side")
    parser.add_argument("--saes", type=int, default=8, help="SAEs of one comparison")
    parser.add_argument("--batches", type=int, default=10, help="batches of 4 x 128 tokens for sparsity and variance")
    parser.add_argument("--ranking", metavar="PROFILE", help="instead: what the optimum of the ranking probe changes")
    options = parser.parse_args()
    if options.ranking:
        print(ranking_table(options.ranking))
        return
    print("| metric | ours, s per SAE | SAEBench | s per SAE | times |\n| --- | --- | --- | --- | --- |")
    for name, (build, share) in cases(options).items():
        if options.only not in name:
            continue
        ours, peers = build()
        mine, rows = [], {label: [] for label in peers}
        for _ in range(options.rounds):
            mine.append(clock(ours) / share)
            for label, peer in peers.items():
                rows[label].append(clock(peer))
        for label, seconds in rows.items():
            ratios = sorted(b / a for a, b in zip(mine, seconds))
            median = statistics.median
            print(
                f"| {name} | {median(mine):.2f} | {label} | {median(seconds):.1f} | **{median(ratios):.0f}** "
                f"({ratios[0]:.0f} to {ratios[-1]:.0f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()

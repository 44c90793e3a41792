"""What stands where in the API reference, and which code computes which equation."""

from __future__ import annotations

#: Page -> its modules, in the order of the page. `methods` takes their classes only;
#: what is left of these modules comes again on `parts`.
METHODS = ("scatlasvae", "cscgan", "garage", "scgacl", "regina")
PAGES: dict[str, tuple[str, ...]] = {
    "methods": ("estimator", *METHODS),
    "parts": (
        "graph",
        *METHODS,
        *("countvae", "likelihoods", "mapping", "surgery"),
        *("wgan", "vaegan", "dropout"),
        *("latentcycle", "pairs", "shrinkage", "states"),
        *("nets", "losses", "training", "cells", "atlas", "rowblocks"),
        *("copies", "validation", "published"),
    ),
    "data": (
        *("datasets", "contract", "h5ad", "readers", "download", "files"),
        *("preprocess", "splits", "conditions", "layouts", "completion"),
        *("simulate", "simatlas", "simperturb"),
    ),
    "evaluation": ("metrics", "baselines", "imputers", "integrators", "perturbers"),
    "chapters": (
        "chapter",
        "homework",
        "selfcheck",
        "records",
        "plots",
        "figure",
        "words",
        "cli",
        "errors",
    ),
}

#: The equation of the book -> what computes it.
EQUATIONS: dict[str, tuple[str, ...]] = {
    "eq-log1p": ("preprocess.normalise",),
    "eq-data-log": ("preprocess.normalise",),
    "eq-data-nb": ("likelihoods.nb_log_prob",),
    "eq-machines-ae": ("losses.masked_mse",),
    "eq-machines-vae": ("losses.kl_to_standard_normal",),
    "eq-machines-gan": ("losses.discriminator_loss", "losses.generator_loss"),
    "eq-machines-w1": ("losses.wasserstein_critic_loss",),
    "eq-machines-penalty": ("losses.gradient_penalty",),
    "eq-machines-attention": ("graph.GAT",),
    "eq-machines-contrast": ("losses.nt_xent",),
    "eq-evaluation-w1": ("metrics.wasserstein", "metrics.sliced_wasserstein"),
    "eq-evaluation-mmd": ("metrics.mmd2", "metrics.mmd"),
    "eq-evaluation-ari": ("metrics.ari", "metrics.ari_over_resolutions"),
    "eq-evaluation-scale": ("metrics.wasserstein",),
    "eq-evaluation-shared": ("conditions.split_controls", "metrics.null_experiment"),
    "eq-scatlasvae-q": ("countvae.Encoder",),
    "eq-scatlasvae-mean": ("countvae.Decoder",),
    "eq-scatlasvae-nb": ("likelihoods.nb_log_prob", "likelihoods.zero_probability"),
    "eq-scatlasvae-zinb": ("likelihoods.zinb_log_prob",),
    "eq-scatlasvae-elbo": (
        *("likelihoods.count_nll", "losses.kl_to_standard_normal"),
        *("losses.gaussian_kl", "countvae.CountVAE"),
    ),
    "eq-scatlasvae-ce": ("losses.weighted_cross_entropy", "losses.class_weights"),
    "eq-cscgan-cbn": ("nets.ConditionalBatchNorm",),
    "eq-cscgan-lsn": ("nets.LibrarySizeNorm", "wgan.Generator"),
    "eq-cscgan-head": ("nets.ClassHead", "wgan.Critic"),
    "eq-cscgan-d": ("wgan.critic_loss", "losses.wasserstein_critic_loss"),
    "eq-cscgan-between": ("losses.gradient_penalty", "wgan.critic_gradient"),
    "eq-cscgan-g": ("wgan.generator_step",),
    "eq-garage-alpha": ("graph.GAT", "graph.knn_graph"),
    "eq-garage-boost": ("graph.GAT", "graph.gat_input"),
    "eq-garage-score": ("graph.attention_scores", "garage.choose_seeds"),
    "eq-garage-batch": ("garage.mixed_batch", "garage.seed_count"),
    "eq-garage-d": ("losses.discriminator_loss", "garage.discriminator_step"),
    "eq-garage-g": ("losses.generator_loss", "garage.generator_step"),
    "eq-scgacl-mixture": ("dropout.fit_mixtures", "dropout.dropout_probability"),
    "eq-scgacl-rec": ("losses.masked_mse",),
    "eq-scgacl-mix": ("losses.mixture_kl", "losses.responsibilities"),
    "eq-scgacl-adv": ("vaegan.discriminator_step", "vaegan.generator_step"),
    "eq-scgacl-cell": ("losses.nt_xent", "vaegan.contrastive_step"),
    "eq-scgacl-type": ("losses.sup_con", "vaegan.contrastive_step"),
    "eq-regina-ae": ("latentcycle.autoencoder_step", "losses.centre_loss"),
    "eq-regina-prompt": ("latentcycle.prompt", "latentcycle.silenced"),
    "eq-regina-move": ("latentcycle.Transition", "latentcycle.move"),
    "eq-regina-cycle": ("latentcycle.transition_step",),
    "eq-regina-adv": ("latentcycle.critic_step", "losses.least_squares_gan_losses"),
    "eq-regina-pair": ("latentcycle.transition_step", "pairs.Pairs"),
}

#: Page -> the modules at home there: for names that no page uses by name.
AT_HOME = {
    "how_to_read": "estimator chapter homework selfcheck plots figure words",
    "scatlasvae": "scatlasvae countvae likelihoods mapping"
    " surgery integrators simatlas",
    "cscgan": "cscgan wgan copies validation",
    "garage": "garage graph published",
    "scgacl": "scgacl vaegan dropout imputers completion",
    "regina": "regina latentcycle pairs shrinkage states"
    " conditions layouts perturbers simperturb",
    "machines": "nets losses training",
    "scale": "cells atlas rowblocks",
    "datasets": "datasets readers download",
    "data": "contract preprocess splits simulate",
    "setup": "h5ad files cli errors",
    "evaluation": "metrics baselines",
    "status": "records",
}
HOME = {name: page for page, names in AT_HOME.items() for name in names.split()}

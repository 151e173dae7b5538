"""transformers' image and video classifiers as chains of blocks or stages, one family for each class."""

import torch
import transformers

from ._host import HostModel
from .family import Family, register_family

__all__: list[str] = []  # registered, not imported


class _TransformersFamily(Family):
    """``XForImageClassification``: a body with embeddings and a list of layers, and a classifier."""

    classes: tuple[type, ...]
    layers = "layers"
    prefix_tokens = 1

    def accepts(self, model):
        return type(model) in self.classes

    @staticmethod
    def body(model: HostModel) -> HostModel:
        return getattr(model, model.base_model_prefix)

    def units(self, model):
        layers = f"{model.base_model_prefix}.{self.layers}"
        return [f"{layers}.{i}" for i in range(len(model.get_submodule(layers)))]

    def widths(self, model):
        return [model.config.hidden_size] * len(self.units(model))

    def has_class_token(self, model):
        return True

    def classifiers(self, model):
        return ["classifier"]

    def begin(self, model, x):
        embeddings = self.body(model).embeddings
        return embeddings(x.to(embeddings.patch_embeddings.projection.weight.dtype))

    def run(self, model, index, state):
        # The layers of transformers take care of gradient checkpointing themselves.
        state = model.get_submodule(self.units(model)[index])(state)
        return state, state

    def features(self, model, index, output, token):
        return output[:, 0] if token == "cls" else output[:, self.prefix_tokens :].mean(1)

    def finish(self, model, state):
        return model.classifier(self.body(model).layernorm(state)[:, 0])


@register_family
class TransformersViT(_TransformersFamily):
    name = "transformers ViTForImageClassification"
    classes = (transformers.ViTForImageClassification,)


@register_family
class TransformersDeiT(_TransformersFamily):
    name = "transformers DeiTForImageClassification, DeiTForImageClassificationWithTeacher"
    classes = (transformers.DeiTForImageClassification, transformers.DeiTForImageClassificationWithTeacher)
    prefix_tokens = 2

    def classifiers(self, model):
        return ["classifier"] if hasattr(model, "classifier") else ["cls_classifier", "distillation_classifier"]

    def finish(self, model, state):
        if hasattr(model, "classifier"):
            return super().finish(model, state)
        x = self.body(model).layernorm(state)
        return (model.cls_classifier(x[:, 0]) + model.distillation_classifier(x[:, 1])) / 2


@register_family
class TransformersDinov2(_TransformersFamily):
    name = "transformers Dinov2ForImageClassification"
    classes = (transformers.Dinov2ForImageClassification,)
    layers = "encoder.layer"

    def finish(self, model, state):
        x = self.body(model).layernorm(state)
        return model.classifier(torch.cat([x[:, 0], x[:, 1:].mean(1)], dim=1))


@register_family
class TransformersBeit(_TransformersFamily):
    name = "transformers BeitForImageClassification"
    classes = (transformers.BeitForImageClassification,)

    def begin(self, model, x):
        if tuple(x.shape[2:]) != self._resolution(model):
            raise ValueError(
                f"this BEiT computes relative positions for images of {self._resolution(model)}, "
                f"got {tuple(x.shape[2:])}."
            )
        return super().begin(model, x)

    @staticmethod
    def _resolution(model: HostModel) -> tuple[int, int]:
        size = model.config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def run(self, model, index, state):
        body, mask, resolution = self.body(model), None, self._resolution(model)
        if body.shared_position_bias is not None:
            window = tuple(side // model.config.patch_size for side in resolution)
            mask = body.shared_position_bias(window, interpolate_pos_encoding=False, dim_size=state.shape[1])
        state = body.layers[index](state, attention_mask=mask, resolution=resolution)
        return state, state

    def finish(self, model, state):
        body = self.body(model)
        return model.classifier(body.pooler(body.layernorm(state)))


@register_family
class TransformersDinov2WithRegisters(_TransformersFamily):
    name = "transformers Dinov2WithRegistersForImageClassification"
    classes = (transformers.Dinov2WithRegistersForImageClassification,)
    layers = "encoder.layer"

    def features(self, model, index, output, token):
        first = 1 + model.config.num_register_tokens
        return output[:, 0] if token == "cls" else output[:, first:].mean(1)

    def finish(self, model, state):
        x = self.body(model).layernorm(state)
        return model.classifier(torch.cat([x[:, 0], self.features(model, 0, x, "mean")], dim=1))


class _VisionTower(_TransformersFamily):
    """The image half of a model of images and text, with a classifier on its patch tokens' mean."""

    layers = "encoder.layers"

    @staticmethod
    def body(model: HostModel) -> HostModel:
        return model.vision_model

    def units(self, model):
        return [f"vision_model.{self.layers}.{index}" for index in range(len(self.body(model).encoder.layers))]

    def widths(self, model):
        return [model.config.vision_config.hidden_size] * len(self.units(model))

    def begin(self, model, x):
        embeddings = self.body(model).embeddings
        return embeddings(x.to(embeddings.patch_embedding.weight.dtype))

    def run(self, model, index, state):
        state = model.get_submodule(self.units(model)[index])(state, None)
        return state, state


@register_family
class TransformersCLIP(_VisionTower):
    name = "transformers CLIPForImageClassification"
    classes = (transformers.CLIPForImageClassification,)

    def begin(self, model, x):
        return self.body(model).pre_layrnorm(super().begin(model, x))

    def finish(self, model, state):
        return model.classifier(self.features(model, 0, state, "mean"))


@register_family
class TransformersSiglip(_VisionTower):
    name = "transformers SiglipForImageClassification"
    classes = (transformers.SiglipForImageClassification,)
    prefix_tokens = 0

    def has_class_token(self, model):
        return False

    def finish(self, model, state):
        return model.classifier(self.body(model).post_layernorm(state).mean(1))


class _TransformersStages(_TransformersFamily):
    """Hierarchical models: every stage's end is an exit, read by its mean over positions."""

    unit = "stage"
    interval = 1

    def has_class_token(self, model):
        return False


@register_family
class TransformersConvNext(_TransformersStages):
    name = "transformers ConvNextForImageClassification"
    classes = (transformers.ConvNextForImageClassification,)
    layers = "encoder.stages"

    def begin(self, model, x):
        embeddings = self.body(model).embeddings
        return embeddings(x.to(embeddings.patch_embeddings.weight.dtype))

    def widths(self, model):
        return list(model.config.hidden_sizes)

    def features(self, model, index, output, token):
        return output.mean((2, 3))  # (B, C, H, W)

    def finish(self, model, state):
        return model.classifier(self.body(model).layernorm(state.mean((2, 3))))


@register_family
class TransformersSwin(_TransformersStages):
    """Positions stand in a row; the grid they come from is passed on as the shape of a tensor without elements."""

    name = "transformers SwinForImageClassification"
    classes = (transformers.SwinForImageClassification,)
    layers = "encoder.layers"

    def widths(self, model):
        stages = self.body(model).encoder.layers
        widths = [model.config.embed_dim * 2**index for index in range(len(stages))]
        return [w * (1 if stage.downsample is None else 2) for w, stage in zip(widths, stages, strict=True)]

    def begin(self, model, x):
        embeddings = self.body(model).embeddings
        tokens, grid = embeddings(x.to(embeddings.patch_embeddings.projection.weight.dtype))
        return tokens, tokens.new_empty((len(tokens), 0, *grid))

    def run(self, model, index, state):
        tokens, grid = state
        stage = self.body(model).encoder.layers[index]
        tokens = stage(tokens, tuple(grid.shape[2:]))[0]
        if stage.downsample is not None:
            grid = grid.new_empty((len(tokens), 0, *((side + 1) // 2 for side in grid.shape[2:])))
        return tokens, (tokens, grid)

    def features(self, model, index, output, token):
        return output.mean(1)

    def finish(self, model, state):
        return model.classifier(self.body(model).layernorm(state[0]).mean(1))


@register_family
class TransformersVideoMAE(_TransformersFamily):
    """Clips (B, T, C, H, W) as joint tokens, each of a patch of two frames; without a class token."""

    name = "transformers VideoMAEForVideoClassification"
    classes = (transformers.VideoMAEForVideoClassification,)
    layers = "encoder.layer"
    sample_ndim = 4
    prefix_tokens = 0

    def has_class_token(self, model):
        return False

    def begin(self, model, x):
        embeddings = self.body(model).embeddings
        return embeddings(x.to(embeddings.patch_embeddings.projection.weight.dtype), None)

    def finish(self, model, state):
        norm = self.body(model).layernorm
        state = state if norm is None else norm(state)
        return model.classifier(state[:, 0] if model.fc_norm is None else model.fc_norm(state.mean(1)))

"""Options of the generators of mask proposals: which there are, and how each is built.

``options.build()`` imports the generator that the options are of and builds it, with random weights but for SAM, which
loads the weights it names when it is first run. A library that is missing, or options that contradict each other, are a
`LexisegError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from lexiseg.strict import StrictModel

if TYPE_CHECKING:
    from lexiseg.proposals.base import ProposalGenerator

Backbone = Literal["r50", "r101", "r50c", "r101c", "tiny"]
ClassHead = Literal["cosine-mlp", "linear", "none"]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class QueryOptions(StrictModel):
    """What MaskFormer and Mask2Former have in common. The defaults are the papers'.

    Attributes:
        backbone: "r101c" and "r50c" are ResNets with a stem of three 3x3 convolutions, strides 4/8/16/32 and dilations
            1, 2, 4 in the last stage (DeOP, ZSSeg, FreeSeg); "r101" and "r50" the plain ones (ZegFormer); all have
            frozen batch norms. "tiny" is a light convolutional network with group norms that trains from scratch.
        widths: inner widths of a ResNet's four stages (its outputs are four times as wide), or the four output widths
            of "tiny". None: 64, 128, 256, 512, or 32, 48, 64, 96 for "tiny".
        stem_width: width of the stem's output; None: 128 for three convolutions, 64 for one. For "tiny" the width
            after its first convolution; None: 16.
        num_queries: N, the number of proposals.
        hidden_dim: width of the queries.
        pixel_dim: width of the pixel decoder.
        mask_dim: width of the mask embeddings.
        heads: attention heads; must divide ``hidden_dim``.
        decoder_layers: layers of the query decoder.
        ffn_dim: hidden width of its feed-forward parts.
        class_head: "cosine-mlp" is a two-layer MLP (ZSSeg, DeOP, FreeSeg), "linear" one layer (ZegFormer); "none"
            leaves the proposals without a class.
        class_hidden: hidden width of that MLP.
        embed_dim: E, the width of the embeddings compared with text: the CLIP model's joint width.
        dropout: dropout of the parts that have one in the released models.
        frozen_dropout: what `ProposalGenerator.train` does to a generator that is not trained: True leaves its dropout
            active, as the released training code does; False keeps its masks the same as at prediction.
    """

    backbone: Backbone = "r101c"
    widths: tuple[Positive, Positive, Positive, Positive] | None = None
    stem_width: Positive | None = None
    num_queries: Positive = 100
    hidden_dim: Positive = 256
    pixel_dim: Positive = 256
    mask_dim: Positive = 256
    heads: Positive = 8
    decoder_layers: Positive = 6
    ffn_dim: Positive = 2048
    class_head: ClassHead = "cosine-mlp"
    class_hidden: Positive = 1024
    embed_dim: Positive = 512
    dropout: Fraction = 0.1
    frozen_dropout: bool = False


class MaskFormerOptions(QueryOptions):
    """Options of `lexiseg.proposals.maskformer.MaskFormer` (DeOP, ZSSeg, ZegFormer)."""

    kind: Literal["maskformer"] = "maskformer"

    def build(self) -> ProposalGenerator:
        """A `MaskFormer` with these options."""
        from lexiseg.proposals.maskformer import MaskFormer

        return MaskFormer(self)


class Mask2FormerOptions(QueryOptions):
    """Options of `lexiseg.proposals.mask2former.Mask2Former` (FreeSeg, MAFT).

    ``dropout`` acts in the deformable encoder and in the context interaction; the query decoder has none.

    Attributes:
        decoder_layers: layers of the masked decoder; 10 in the released models, which predict once more before the
            first.
        encoder_layers: layers of the deformable encoder.
        encoder_ffn_dim: hidden width of its feed-forward parts (released: 1024, whatever the configuration says).
        encoder_heads: its heads; None: ``heads``.
        encoder_points: its sampling points per level.
        interaction: let the features attend to the words before the masked decoder (FreeSeg). The generator then needs
            ``text``.
        interaction_dim: inner width of that attention (released: 2048).
        interaction_heads: its heads; None: ``heads``.
        text_dim: width of the text embeddings it attends to; None: ``embed_dim``.
    """

    kind: Literal["mask2former"] = "mask2former"
    decoder_layers: Positive = 10
    encoder_layers: Positive = 6
    encoder_ffn_dim: Positive = 1024
    encoder_heads: Positive | None = None
    encoder_points: Positive = 4
    interaction: bool = True
    interaction_dim: Positive = 2048
    interaction_heads: Positive | None = None
    text_dim: Positive | None = None

    def build(self) -> ProposalGenerator:
        """A `Mask2Former` with these options."""
        from lexiseg.proposals.mask2former import Mask2Former

        return Mask2Former(self)


class SamOptions(StrictModel):
    """Options of `lexiseg.proposals.sam.Sam`: Segment Anything's automatic masks, training-free and without classes.

    Attributes:
        weights: name of a SAM or SAM 2 model on the Hugging Face hub, or a local folder of one.
        points_per_side: a grid of this many points squared prompts the model.
        points_per_batch: prompts run at once.
        pred_iou: masks whose predicted IoU is lower are dropped.
        stability: masks whose stability under another threshold is lower are dropped.
        nms: of two masks whose boxes overlap by more than this IoU, the worse is dropped.
        overlaps: which mask keeps a pixel that lies in several: the "largest" (DeOP's demonstration goes through the
            masks from the largest on), the "smallest", or "all" of them; masks left empty are dropped.
        max_masks: at most this many masks per image, the best first; None for all.
        mask_stride: masks are averaged over squares of this side; 1 keeps every pixel.
    """

    kind: Literal["sam"] = "sam"
    weights: str = "facebook/sam-vit-huge"
    points_per_side: Positive = 32
    points_per_batch: Positive = 64
    pred_iou: float = 0.88
    stability: float = 0.95
    nms: float = 0.7
    overlaps: Literal["largest", "smallest", "all"] = "largest"
    max_masks: Positive | None = None
    mask_stride: Positive = 4

    def build(self) -> ProposalGenerator:
        """A `Sam` with these options."""
        from lexiseg.proposals.sam import Sam

        return Sam(self)


class GroundTruthOptions(StrictModel):
    """Options of `lexiseg.proposals.given.GroundTruth`: the masks of labels that are given, for analysis."""

    kind: Literal["ground-truth"] = "ground-truth"

    def build(self) -> ProposalGenerator:
        """A `GroundTruth` with these options."""
        from lexiseg.proposals.given import GroundTruth

        return GroundTruth()


# The field `kind` says which; an option that the kind does not have is an error.
GeneratorOptions: TypeAlias = Annotated[
    MaskFormerOptions | Mask2FormerOptions | SamOptions | GroundTruthOptions, Field(discriminator="kind")
]

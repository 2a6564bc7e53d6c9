"""Slow, literal reference implementations: one pair at a time, angles by acos, nothing shared with the package."""

import math

import torch


def cosine(x, y):
    return (x @ y) / (x.norm() * y.norm())


def info_nce(anchors, candidates, temperature):
    total = 0.0
    for i, anchor in enumerate(anchors):
        scores = [torch.exp(cosine(anchor, candidate) / temperature) for candidate in candidates]
        total = total - torch.log(scores[i] / sum(scores))
    return total / len(anchors)


def arc_cse(anchors, candidates, margin, temperature):
    total = 0.0
    for i, anchor in enumerate(anchors):
        scores = []
        for j, candidate in enumerate(candidates):
            angle = torch.acos(cosine(anchor, candidate))
            scores.append(torch.exp(torch.cos(angle + (margin if i == j else 0.0)) / temperature))
        total = total - torch.log(scores[i] / sum(scores))
    return total / len(anchors)


def adap_acse(anchors, candidates, alpha, margin, temperature, keep=None, guard=True):
    total = 0.0
    for i, anchor in enumerate(anchors):
        positive, denominator = None, 0.0
        for j, candidate in enumerate(candidates):
            angle = torch.acos(cosine(anchor, candidate))
            if i == j:
                positive = torch.exp(torch.cos(angle) / temperature)
                denominator = denominator + positive
                continue
            if keep is not None and not keep[i][j]:
                continue
            if not guard or angle.item() > margin:
                angle = angle - margin * abs(1 - float(alpha[i][j]))
            denominator = denominator + torch.exp(torch.cos(angle) / temperature)
        total = total - torch.log(positive / denominator)
    return total / len(anchors)


def soft_labels(anchors, candidates):
    return [[float(cosine(a, c)) for c in candidates] for a in anchors]


def head(module, rows):
    return torch.tanh(rows @ module.dense.weight.T + module.dense.bias)


def kdmcse(heads, views, image, text, *, recipe, weight, margin, threshold=None):
    """The whole loss of the two recipes, read off the table of the method."""
    h1, h2 = (head(heads["text"], view) for view in views)
    ones_off = [[0.0] * len(h1) for _ in h1]
    if recipe == "paper":
        loss = info_nce(h1, h2, 0.05)
    else:
        loss = adap_acse(h1, h2, ones_off, 0.15, 0.05)
    v, t = head(heads["teacher_image"], image), head(heads["teacher_text"], text)
    if recipe == "paper":
        image_labels, text_labels = soft_labels(text, image), soft_labels(text, text)
        image_scores, text_scores = image_labels, text_labels
    else:
        image_labels, text_labels = soft_labels(image, image), soft_labels(text, text)
        image_scores = [[float(a @ b) for b in image] for a in text]
        text_scores = [[float(a @ b) for b in text] for a in image]
    keep_image = keep_text = None
    if threshold is not None:
        leaves = (lambda score: score >= threshold) if recipe == "paper" else (lambda score: score > threshold)
        keep_image = [[not leaves(score) for score in row] for row in image_scores]
        keep_text = [[not leaves(score) for score in row] for row in text_scores]
    terms = {"image": 0.0, "caption": 0.0}
    for view in views:
        s = head(heads["grounding"], view)
        terms["image"] = terms["image"] + adap_acse(s, v, image_labels, margin, 0.05, keep_image)
        terms["caption"] = terms["caption"] + adap_acse(s, t, text_labels, margin, 0.05, keep_text)
    # Sum over views and mean over modalities, or mean over views and sum over modalities: half of everything.
    return loss + weight * (terms["image"] + terms["caption"]) / 2


def uniformity(x, t):
    x = [row / row.norm() for row in x]
    values = [math.exp(-t * float((x[i] - x[j]).square().sum())) for i in range(len(x)) for j in range(i)]
    return math.log(sum(values) / len(values))


def softmax(values):
    values = [torch.exp(torch.as_tensor(value)) for value in values]
    return [value / sum(values) for value in values]


def in_list(i, count, keep):
    return [j for j in range(count) if j != i and (keep is None or keep[i][j])]


def soft_info_nce(anchors, candidates, temperature, shares, keep=None, margin=0.0):
    """InfoNCE with several positives; a fixed margin on the others."""
    total = 0.0
    for i, anchor in enumerate(anchors):
        scores = {}
        for j, candidate in enumerate(candidates):
            positive = i == j or shares[i][j] > 0
            if not positive and keep is not None and not keep[i][j]:
                continue
            angle = torch.acos(cosine(anchor, candidate))
            if not positive and angle.item() > margin:
                angle = angle - margin
            scores[j] = torch.exp(torch.cos(angle) / temperature)
        for j, score in scores.items():
            total = total - float(shares[i][j]) * torch.log(score / sum(scores.values()))
    return total / len(anchors)


def listnet(anchors, candidates, teacher, temperature, teacher_temperature, keep=None):
    total = 0.0
    for i, anchor in enumerate(anchors):
        listed = in_list(i, len(candidates), keep)
        target = softmax([teacher[i][j] / teacher_temperature for j in listed])
        given = softmax([cosine(anchor, candidates[j]) / temperature for j in listed])
        total = total - sum(q * torch.log(p) for q, p in zip(target, given, strict=True))
    return total / len(anchors)


def listmle(anchors, candidates, teacher, temperature, length, keep=None):
    total = 0.0
    for i, anchor in enumerate(anchors):
        order = sorted(in_list(i, len(candidates), keep), key=lambda j: -float(teacher[i][j]))
        scores = [cosine(anchor, candidates[j]) / temperature for j in order]
        top = min(length, len(order))
        for k in range(top):
            total = total - (scores[k] - torch.log(sum(torch.exp(score) for score in scores[k:]))) / top
    return total / len(anchors)


def list_consistency(first, second, temperature):
    total = 0.0
    for i in range(len(first)):
        listed = in_list(i, len(first), None)
        p = softmax([cosine(first[i], second[j]) / temperature for j in listed])
        r = softmax([cosine(second[i], first[j]) / temperature for j in listed])
        for a, b in zip(p, r, strict=True):
            middle = (a + b) / 2
            total = total + (a * torch.log(a / middle) + b * torch.log(b / middle)) / 2
    return total / len(first)


def shuffled_groups(teacher, noise, temperature, mass, keep=None):
    result = [[float(value) for value in row] for row in teacher]
    for i, row in enumerate(result):
        listed = in_list(i, len(row), keep)
        share = dict(zip(listed, softmax([row[j] / temperature for j in listed]), strict=True))
        ranked = sorted(listed, key=lambda j: -float(share[j]))
        groups, before = {}, 0.0
        for j in ranked:
            groups.setdefault(int(before / mass), []).append(j)
            before += float(share[j])
        old = list(row)
        for group in groups.values():
            for one, other in zip(sorted(group, key=lambda j: float(noise[i][j])), group, strict=True):
                row[one] = old[other]
    return result


def fuse(scores, weights, mean, std, correlation):
    kinds = range(len(weights))
    variance = sum(weights[a] * weights[b] * float(correlation[a][b]) for a in kinds for b in kinds)
    return sum(weights[b] * (scores[b] - float(mean[b])) / float(std[b]) for b in kinds) / math.sqrt(variance)


def distribution(score, quantiles):
    """The share of even steps below a score, by hand."""
    steps = len(quantiles) - 1
    if score <= quantiles[0]:
        return 0.0
    for k in range(1, steps + 1):
        if score <= quantiles[k]:
            return (k - 1 + (score - quantiles[k - 1]) / (quantiles[k] - quantiles[k - 1])) / steps
    return 1.0

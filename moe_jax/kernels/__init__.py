"""Operations on the arrays of one device; none owns a parameter.

An operation is a file, or a folder with a file for each backend and one that chooses between them.

Input of a forward pass
    forward_batch      tokens, segments and page tables of a step
    step               the batch, with the way that its rows take between devices

Routed experts
    routing            router logits to the experts and weights of each row
    routed_experts     rows to weighted sums of their experts' outputs
    grouped_matmul     a matmul for each group of rows
    activation         gated activations

Attention
    kv_cache           paged keys and values
    attention          scores, masks and grouped-query attention
    online_softmax     softmax over blocks of cached positions, in one pass
    rope               rotary position embedding
    query_scaling      queries that grow with their position

Recurrent layers
    recurrences        delta rule, linear attention and selective scan
    recurrent_states   a state of fixed size for each sequence

Weights
    quantized          weights in eight bits
    stacked_weight     the weights of one layer, read where they lie in a stack of layers
"""

-- Stands in front of every script. Time is Redis's own, in whole milliseconds: the workers' clocks are never compared.
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local ENDED = { completed = true, failed = true, cancelled = true, expired = true }

-- Owes a callback: it is due at `at`, in the queue of the origin that it goes to. `origins` knows since when each queue may have
-- something due. A queue each, so that an origin that is slow or down is never in the way of another.
local function owe(origins, origin, id, at)
  redis.call('ZADD', origins .. ':' .. origin, at, id)
  local first = redis.call('ZSCORE', origins, origin)
  if not first or at < tonumber(first) then
    redis.call('ZADD', origins, at, origin)
  end
end

-- Owes it no more; an origin without a callback leaves nothing behind.
local function unowe(origins, origin, id)
  redis.call('ZREM', origins .. ':' .. origin, id)
  if redis.call('EXISTS', origins .. ':' .. origin) == 0 then
    redis.call('ZREM', origins, origin)
  end
end

-- A history of attempts, a line each, without its first lines where it has grown long.
local function shortened(history)
  while #history > 8192 do
    history = string.sub(history, string.find(history, '\n', 1, true) + 1)
  end
  return history
end

-- Milliseconds since this store was new, or may have lost writes; one that nobody has looked at yet is new.
local function sure_for(tick_key, now)
  local since = tonumber(redis.call('HGET', tick_key, 'unsure_at'))
  return since and now - since or 0
end
